"""Scores of the bundled reward from workers that all start at once in a fresh process.

    python tests/cold_start.py one-model|own-models|processes COUNT

One JSON list on stdout, the score of each worker. Meant for a subprocess: in a test session the libraries are
imported already, and the first use of them is what this is about.
"""

import json
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any


def score(model: Any = None) -> float:
    """One picture, by this model or by one that is loaded now."""
    import torch
    from PIL import Image

    import dina_lrm

    torch.set_num_threads(1)
    model = model or dina_lrm.RewardModel.from_pretrained("bundled")
    picture = Image.linear_gradient("L").resize((64, 64))
    return model.score("a red circle on a gray background", picture, [0.2, 0.5], seed=3).scores.item()


def scores(mode: str, count: int) -> list[float]:
    if mode == "processes":
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            return list(pool.map(score, [None] * count))
    model = None
    if mode == "one-model":
        import dina_lrm

        model = dina_lrm.RewardModel.from_pretrained("bundled")
    together = threading.Barrier(count)

    def start(_: int) -> float:
        together.wait()
        return score(model)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


if __name__ == "__main__":
    print(json.dumps(scores(sys.argv[1], int(sys.argv[2]))))
