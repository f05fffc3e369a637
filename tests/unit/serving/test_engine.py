"""Passes of the model: which pieces of work can share one, and that sharing changes no score."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save
from torch import Tensor

from dina_lrm import Conditioning, RewardModel
from dina_lrm.backbones.backbone import Backbone
from dina_lrm.serving.engine import Draws, Engine, Row
from tests.families import family_conditioning, family_latents, make_family_reward
from tests.unit.serving.conftest import HEADERS


def rows_of(model: RewardModel, family: str, lengths: list[int]) -> list[Row]:
    latents = family_latents(family, batch=len(lengths))
    texts = [family_conditioning(family, 1, tokens=length, seed=length) for length in lengths]
    return [Row(latents[i], text, (0.4,), seed=i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_texts_of_any_length_share_a_pass_where_padding_is_masked(
    family: str, family_folders: Callable[[str], Path]
) -> None:
    model = make_family_reward(family_folders(family)).requires_grad_(False)
    engine = Engine(model)
    rows = rows_of(model, family, list(range(3, 19)))
    units = [engine.score_unit(row, Draws(row), 0) for row in rows]
    assert len({unit.kind for unit in units}) == 1
    together = engine.run(list(units))
    alone = [engine.run([engine.score_unit(row, Draws(row), 0)])[0] for row in rows]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-5, atol=1e-5)


def test_texts_of_two_lengths_are_two_kinds_where_padding_is_seen(reward: RewardModel) -> None:
    engine = Engine(reward)
    width, pooled = reward.backbone.architecture.prompt_dim, reward.backbone.architecture.pooled_dim
    assert pooled is not None
    kinds = set()
    for length in (5, 9):
        text = Conditioning(torch.zeros(1, length, width), torch.zeros(1, pooled))
        row = Row(torch.zeros(16, 8, 8), text, (0.4,), seed=0)
        kinds.add(engine.score_unit(row, Draws(row), 0).kind)
    assert len(kinds) == 2


def test_a_latent_request_is_checked_once(
    client: TestClient, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes by the backbone, values by the protocol, and neither again where it is scored."""
    checks: Counter[str] = Counter()
    scans: list[int] = []

    def counting(name: str) -> None:
        original = getattr(Backbone, name)

        def counted(*args: Any, **settings: Any) -> Any:
            checks[name] += 1
            return original(*args, **settings)

        monkeypatch.setattr(Backbone, name, counted)

    def scanned(value: Tensor) -> bool:
        scans.append(value.numel())
        return bool(torch.isfinite(value).all())

    counting("check_latents")
    counting("check_conditioning")
    monkeypatch.setattr("dina_lrm.core.tensors._is_finite", scanned)
    assert client.post("/v1/score", content=save(tensors), headers=HEADERS).status_code == 200
    assert checks == {"check_latents": 1, "check_conditioning": 1}
    floats = [tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()]
    assert sorted(scans) == sorted(floats)
