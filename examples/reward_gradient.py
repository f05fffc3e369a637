"""Improve a latent by climbing the reward's gradient, which never crosses the VAE.

A few steps raise the score; whether the picture got better is for the gold judge to say. Without care a
generator trained this way learns to please the reward and not the eye.
"""

import numpy as np
import torch

import dina_lrm
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene

rng = np.random.default_rng(1)
spec = sample_caption(rng, num_objects=1)
picture = render(sample_scene(rng, change_attribute(rng, spec)))

model = dina_lrm.RewardModel.from_pretrained("bundled")
conditioning = model.encode_prompts([spec.caption])
latents = model.encode_images([picture])
for step in range(6):
    latents = latents.detach().requires_grad_()
    score = model.score_latents(latents, conditioning, noise_levels=[0.4], seed=0)
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    print(f"step {step}: score {score.item():+.3f}, gradient norm {gradient.norm().item():.3f}")
    latents = latents + 0.5 * gradient / gradient.norm()
