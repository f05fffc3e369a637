"""The best of eight pictures for less than the price of four: candidates are dropped while they are noisy.

python examples/search_while_sampling.py
"""

from typing import Any

from dina_lrm import RewardModel
from dina_lrm.sampling import search
from dina_lrm.shapes.pipeline import load_pipeline

prompt = "a big green cross to the left of a small yellow circle on a black background"
pipeline: Any = load_pipeline()  # diffusers annotates its callback too narrowly
model = RewardModel.from_pretrained("bundled", pipeline).requires_grad_(False)

prune = search.Pruner(model, prompt, steps=12)
images = pipeline(
    prompt,
    num_images_per_prompt=8,
    num_inference_steps=12,
    max_sequence_length=20,
    callback_on_step_end=prune,
    callback_on_step_end_tensor_inputs=prune.tensor_inputs(pipeline),
).images
print(f"sampled to the end: candidates {prune.kept} of 8")
best = model.rank(prompt, images)[0]
print(f"score of the best: {best.score:.2f}, a picture of {best.image.size[0]} x {best.image.size[1]} pixels")
