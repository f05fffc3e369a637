"""Token-level noise ensembles against the paper's own code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dina_lrm import Conditioning, RewardModel

TOLERANCE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def io(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "E_ensemble_A" / "io.safetensors")


@pytest.fixture(scope="module")
def model(golden: Path) -> RewardModel:
    case = golden / "A_lora_dual"
    return RewardModel.from_pretrained(case / "reward", pipeline=case).requires_grad_(False)


@pytest.fixture(scope="module")
def conditioning(io: dict[str, Tensor]) -> Conditioning:
    return Conditioning(io["encoder_hidden_states"], io["pooled_projections"])


@pytest.mark.parametrize("max_batch_size", [64, 4, 1])
@pytest.mark.parametrize("levels", ["u3", "u5"])
def test_ensemble(
    model: RewardModel, io: dict[str, Tensor], conditioning: Conditioning, levels: str, max_batch_size: int
) -> None:
    model.max_batch_size = max_batch_size
    scores = model.score_latents(io["latents"], conditioning, io[f"{levels}.u"].tolist(), noise=io["noise"])
    torch.testing.assert_close(scores, io[f"{levels}.reward_b3"][:, 0], **TOLERANCE)
    torch.testing.assert_close(scores, io[f"{levels}.reward_b1"][:, 0], **TOLERANCE)
    if levels == "u3":
        torch.testing.assert_close(scores, io["u3.reward_validate_ensemble"][:, 0], **TOLERANCE)


@pytest.mark.parametrize("levels", ["u3", "u5"])
def test_single_levels_and_their_average(
    model: RewardModel, io: dict[str, Tensor], conditioning: Conditioning, levels: str
) -> None:
    expected = io[f"{levels}.single_level_reward"][..., 0]
    args = (io["latents"], conditioning)
    for level, one in zip(io[f"{levels}.u"].tolist(), expected, strict=True):
        torch.testing.assert_close(model.score_latents(*args, level, noise=io["noise"]), one, **TOLERANCE)
    averaged = model.score_latents(*args, io[f"{levels}.u"].tolist(), noise=io["noise"], ensemble="scores")
    torch.testing.assert_close(averaged, expected.mean(dim=0), **TOLERANCE)


@pytest.mark.parametrize("levels", ["u3", "u5"])
def test_query_states(
    model: RewardModel, io: dict[str, Tensor], conditioning: Conditioning, levels: str
) -> None:
    head, tokens = model.head, []
    for sigma in io[f"{levels}.sigma"]:
        noisy = model.schedule.add_noise(io["latents"], io["noise"], sigma)
        features = model.backbone(noisy, conditioning, sigma)
        tokens.append(head.aggregate(features.image, features.text, features.temb))
    image, text = (torch.cat(stream, dim=1) for stream in zip(*tokens, strict=True))
    first = head.attn1(head.query_tokens.expand(3, -1, -1), image, text)
    second = head.attn2(first, image)
    third = second + head.ff(head.norm_ff(second))
    states = {"q_attn1": first, "q_attn2": second, "q_ffn": third, "per_query": head.head(third)}
    for name, state in states.items():
        torch.testing.assert_close(state, io[f"{levels}.{name}"], atol=5e-5, rtol=0)
