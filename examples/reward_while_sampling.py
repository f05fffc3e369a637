"""Which of four pictures will the reward like best, and how early in the sampling does it know?

The reward shares the generator's transformer (`attach`) and scores the state of every step at that step's
noise level (`watch`). The bundled reward has LoRA, so a step costs one more pass of five of the six blocks; a
frozen reward would read the generator's own pass and cost the head alone. A score has no zero, and each noise
level its own offset: what means something is the difference between pictures at one step.
"""

from typing import Any

import torch

import dina_lrm
from dina_lrm.shapes.pipeline import load_pipeline

prompt = "a red circle on a gray background"
pipeline: Any = load_pipeline()  # diffusers annotates its callback too narrowly
model = dina_lrm.RewardModel.from_pretrained("bundled").attach(pipeline)
with model.watch(pipeline) as watch:
    pipeline(
        prompt,
        num_images_per_prompt=4,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        output_type="latent",
    )
for step in watch.steps:
    lead = step.scores - step.scores.mean()
    print(f"sigma {step.sigma:.2f}: ", ", ".join(f"{value:+.2f}" for value in lead.tolist()))
