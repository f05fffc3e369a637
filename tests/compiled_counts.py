"""Scores with and without `compile` for batches of several sizes, and how much torch compiled for them.

python tests/compiled_counts.py BACKEND FAMILY FOLDER

Run as a program, since torch cannot look into the shape checks that the tests put around every function.
Prints one JSON object.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from dina_lrm import RewardModel
from dina_lrm.models.compiled import Regions

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository: this file is no installed module
from tests.families import family_conditioning, family_latents, make_family, make_family_reward

BATCHES = (1, 2, 3, 5)
SIZES = ((8, 8), (12, 8), (16, 12), (8, 16), (12, 20))


def main(backend: str, family: str, folder: str) -> None:
    model = make_family_reward(make_family(family, Path(folder))).requires_grad_(False)
    differences, gradients = [], []
    with torch.no_grad():
        for batch in BATCHES:
            for levels in (0.4, [0.2, 0.5, 0.7]):
                wanted, found = both(model, backend, family, batch, levels)
                differences.append((wanted - found).abs().max().item())
    after_batches = counters["stats"]["unique_graphs"]
    by_size = []
    with torch.no_grad():
        for height, width in SIZES:
            latents = family_latents(family, 2, height, width)
            model.score_latents(latents, family_conditioning(family), 0.4, seed=0)
            by_size.append(counters["stats"]["unique_graphs"])
    for compiled in (False, True):
        set_compiled(model, backend if compiled else None)
        latents = family_latents(family).requires_grad_()
        model.score_latents(latents, family_conditioning(family), 0.4, seed=0).sum().backward()
        assert latents.grad is not None
        gradients.append(latents.grad)
    print(
        json.dumps(
            {
                "difference": max(differences),
                "gradient_difference": (gradients[0] - gradients[1]).abs().max().item(),
                "graph_breaks": dict(counters["graph_break"]),
                "after_batches": after_batches,
                "after_sizes": by_size,
            }
        )
    )


def both(
    model: RewardModel, backend: str, family: str, batch: int, levels: float | list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = family_latents(family, batch), family_conditioning(family, batch)
    found = []
    for compiled in (None, backend):
        set_compiled(model, compiled)
        found.append(model.score_latents(*inputs, levels, seed=0))
    return found[0], found[1]


def set_compiled(model: RewardModel, backend: str | None) -> None:
    model._compiled = Regions(backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
