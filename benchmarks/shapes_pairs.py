"""Makes preference pairs of the shapes domain, one file for each seed, in processes side by side.

    python benchmarks/shapes_pairs.py --output PAIRS --seeds 101 102 --num-prompts 3600

`dina-lrm train shapes --data.train PAIRS` trains on all of them. One process makes a file, on one thread, so
the files do not depend on how many are made at once.
"""

import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from dina_lrm.build.pairs import shapes_pairs
from dina_lrm.build.training import reward_model
from dina_lrm.recipes import training as recipes
from dina_lrm.shapes.pairs import PairKind
from dina_lrm.shapes.scenes import Part


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """Folder for KIND-SEED.safetensors."""
    seeds: tuple[int, ...]
    """Of the captions, pictures and votes of each file."""
    num_prompts: int = 3600
    """Captions in each file; six pairs come from each caption."""
    kind: PairKind = "plain"
    """Which pictures are compared (`dina_lrm.shapes.pairs`): plain, varied with more damage, renders without
    generated ones."""
    part: Part | None = "train"
    """Which captions; None: any."""
    num_raters: int = 5
    """Votes for each pair, an odd number."""
    processes: int = 2
    """Files made at the same time."""


def main(options: Options) -> None:
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for line in pool.imap(partial(make, options), options.seeds):
            print(line, flush=True)


def make(options: Options, seed: int) -> str:
    """One file."""
    torch.set_num_threads(1)
    model = reward_model(recipes.shapes().model)  # its encoders are used, its weights are not
    pairs = shapes_pairs(
        model,
        num_prompts=options.num_prompts,
        seed=seed,
        part=options.part,
        kind=options.kind,
        num_raters=options.num_raters,
    )
    path = options.output / f"{options.kind}-{seed}.safetensors"
    pairs.save(path)
    return f"{path}: {len(pairs)} pairs"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
