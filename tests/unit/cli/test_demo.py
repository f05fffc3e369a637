"""What the demo's seed decides."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dina_lrm.cli.demo import Demo, demo_recipe, train_fresh
from dina_lrm.training import trainer


@pytest.mark.long
def test_the_seed_decides_the_first_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = SimpleNamespace(history=[], seconds=0.0)
    monkeypatch.setattr(trainer, "train", lambda *_, **__: untrained)
    pairs: Any = range(12)

    def first_weights(seed: int) -> list[torch.Tensor]:
        model, _, _ = train_fresh("bundled", pairs, pairs, Demo(output=tmp_path, seed=seed))
        return [value for value in model.head.parameters() if value.unique().numel() > 1]

    zero, again, one = map(first_weights, (0, 0, 1))
    assert zero
    assert all(torch.equal(a, b) for a, b in zip(zero, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(zero, one, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(("num_pairs", "batch_size"), [(12, 12), (780, 96)])
def test_a_batch_follows_the_pairs(num_pairs: int, batch_size: int, tmp_path: Path) -> None:
    """Of two captions there are 12 pairs, and the recipe's batch is 96."""
    assert demo_recipe(Demo(output=tmp_path), num_pairs).batch_size == batch_size
