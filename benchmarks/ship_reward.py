"""Puts a trained reward into the package as the bundled one, with its measured figures in the model card.

    python benchmarks/ship_reward.py RUN [--results RUN/evaluation/shapes/results.md]

The head is stored in bfloat16, as the pipeline is, so that everything bundled stays under 30 MB. Evaluate
the bundled reward afterwards: what is stated is then measured on what ships.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import dina_lrm
from dina_lrm.shapes.pipeline import bundled_pipeline_folder


@dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """Folder of `dina-lrm train shapes`."""
    results: Path | None = None
    """Table of figures (results.md of an evaluation) for the model card."""


def main(options: Options) -> None:
    model = dina_lrm.RewardModel.from_pretrained(options.run, pipeline="bundled")
    model.head.to(torch.bfloat16)
    card = None if options.results is None else f"## Measured\n\n{options.results.read_text().strip()}\n"
    folder = model.save_pretrained(bundled_pipeline_folder().parent / "reward", model_card=card)
    size = sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file())
    print(f"{folder}: all bundled weights now take {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
