"""Generate pictures of one caption, rank them by the reward, ask the gold judge about the order."""

import dina_lrm
from dina_lrm.shapes.judge import judge
from dina_lrm.shapes.pipeline import generate, load_pipeline

caption = "a big red circle on a gray background"
pipeline = load_pipeline()
pictures = [
    generate(pipeline, [caption], [seed], num_inference_steps=steps, guidance_scale=3.0)[0]
    for seed, steps in enumerate((4, 6, 8, 12, 16, 20))
]

model = dina_lrm.RewardModel.from_pretrained("bundled", pipeline=pipeline)
print(caption)
for place, ranked in enumerate(model.rank(caption, pictures), start=1):
    opinion = judge(pictures[ranked.index], caption)
    print(f"  {place}. picture {ranked.index}   reward {ranked.score:+.3f}   judge {opinion.utility:.2f}")
