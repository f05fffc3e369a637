"""Train a reward on your own preference rows: files on disk, rows, training, a saved checkpoint.

The rows here are drawn on the spot (a correct picture against one with something changed), in several sizes;
put your own file in their place. The few seconds of training show the way and make no good reward.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import dina_lrm
from dina_lrm.build.training import run_training
from dina_lrm.recipes.training import bundled
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import change_attribute, sample_caption, sample_scene
from dina_lrm.training.config import DataConfig


def draw_rows(folder: Path, count: int = 48) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        spec = sample_caption(rng, num_objects=1)
        names = {side: f"{number}-{side}.png" for side in ("chosen", "rejected")}
        size = [(64, 64), (96, 64), (80, 120)][number % 3]
        for name, scene in zip(names.values(), (spec, change_attribute(rng, spec)), strict=True):
            render(sample_scene(rng, scene)).resize(size).save(folder / name)
        rows.append({"prompt": spec.caption, **names})
    rows.append(rows[0] | {"chosen": "absent.png"})  # listed in OUTPUT/pairs/train/rejects.jsonl
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    rows = draw_rows(folder)
    config = replace(bundled(), data=DataConfig(train=str(rows)), output=str(folder / "reward"), num_steps=20)
    _, result = run_training(config, log=print)
    print(f"{result.steps} steps in {result.seconds:.0f} s; accuracy {result.validation}")
    again = dina_lrm.RewardModel.from_pretrained(folder / "reward")
    print(again.score("a red circle on a gray background", folder / "0-chosen.png", seed=0).scores)


if __name__ == "__main__":  # pictures are encoded in processes of their own
    main()
