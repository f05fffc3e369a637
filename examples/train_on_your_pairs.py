"""Train a reward on your own preference rows: files on disk, rows, latents, training, a saved checkpoint.

The rows here are drawn on the spot (a correct picture against one with something changed); put your own JSON
lines in their place. The few seconds of training show the way and make no good reward.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import dina_lrm
from dina_lrm.data import encode_pairs, read_pairs
from dina_lrm.recipes import shapes_quick
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene
from dina_lrm.training.trainer import train

folder = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
rows = []
for number in range(48):
    spec = sample_caption(rng, num_objects=1)
    for side, scene in (("chosen", spec), ("rejected", change_attribute(rng, spec))):
        render(sample_scene(rng, scene)).save(folder / f"{number}-{side}.png")
    rows.append(
        {"prompt": spec.caption, "chosen": f"{number}-chosen.png", "rejected": f"{number}-rejected.png"}
    )
rows.append({"prompt": "a row whose picture is gone", "chosen": "absent.png", "rejected": "0-rejected.png"})
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

model = dina_lrm.RewardModel.initialize(
    "bundled", num_blocks=4, image_taps=(2, 4), text_taps=(2,), lora_rank=4
)
found = read_pairs(folder / "rows.jsonl")
print(found.summary())
pairs = encode_pairs(model, found.pairs)
config = replace(
    shapes_quick(), output=str(folder / "reward"), num_steps=20, time_budget_seconds=15.0, batch_size=16
)
result = train(config, model, pairs)
print(f"{result.steps} steps in {result.seconds:.0f} s")

again = dina_lrm.RewardModel.from_pretrained(folder / "reward")
print(again.score(rows[0]["prompt"], folder / rows[0]["chosen"], noise_levels=0.4, seed=0).scores)
