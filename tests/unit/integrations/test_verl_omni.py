"""verl-omni's call: by keyword, one sample at a time, many at once."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_lrm import Conditioning, InvalidInputError, RewardModel
from dina_lrm.errors import ScoringError
from dina_lrm.integrations import verl_omni
from dina_lrm.integrations.verl_omni import compute_score
from tests.families import make_family_reward
from tests.unit.integrations.server import Server, ok

LOCAL = {"reward": "bundled", "device": "cpu"}


@pytest.fixture
def info(conditioning: Conditioning) -> dict[str, Any]:
    """Embeddings of the first prompt, as the manager hands them over."""
    assert conditioning.pooled_prompt_embeds is not None
    return {
        "num_turns": 1,
        "prompt_embeds": conditioning.prompt_embeds[0],
        "pooled_prompt_embeds": conditioning.pooled_prompt_embeds[0],
    }


def call(solution_image: Any, prompt: str = "", extra_info: Any = None, **settings: Any) -> dict[str, float]:
    return compute_score(
        data_source="test",
        solution_image=solution_image,
        ground_truth=prompt,
        extra_info=extra_info,
        **settings,
    )


# --- here


def test_a_picture(bundled: RewardModel, prompts: list[str], pictures: Tensor) -> None:
    expected = bundled.score(prompts, pictures, 0.4, 0).scores.tolist()
    for i in range(2):
        whole = call(
            pictures[i], prompts[i], {}, reward_router_address="unused", model_name="unused", **LOCAL
        )
        assert whole == {"score": pytest.approx(expected[i], abs=1e-4), "dina_raw": whole["score"]}
        in_floats = call(pictures[i].float() / 255, prompts[i], None, **LOCAL)
        one_frame = call(pictures[i : i + 1], prompts[i], None, **LOCAL)
        assert whole == in_floats == one_frame


def test_a_latent(
    bundled: RewardModel, latents: Tensor, conditioning: Conditioning, info: dict[str, Any]
) -> None:
    row = conditioning.index_select(torch.tensor([0]))
    expected = bundled.score_latents(latents[:1], row, 0.4, seed=0).item()
    assert call(latents[0], "", info, **LOCAL) == {"score": expected, "dina_raw": expected}
    batched = {name: value[None] for name, value in info.items() if isinstance(value, Tensor)}
    assert call(latents[:1], "", batched, **LOCAL)["score"] == expected
    both = call(torch.zeros(3, 64, 64, dtype=torch.uint8), "", info | {"latents_clean": latents[0]}, **LOCAL)
    assert both["score"] == expected


def test_level_seed_scale_and_bias(
    bundled: RewardModel, latents: Tensor, conditioning: Conditioning, info: dict[str, Any]
) -> None:
    row = conditioning.index_select(torch.tensor([0]))
    raw = bundled.score_latents(latents[:1], row, [0.2, 0.7], seed=9).item()
    found = call(
        latents[0],
        "",
        info,
        noise_level=[0.2, 0.7],
        noise_seed=9,
        score_scale=0.1,
        score_bias=1.0,
        **LOCAL,
    )
    assert found["dina_raw"] == raw
    assert found["score"] == pytest.approx((raw + 10) / 10, rel=1e-12)
    default = bundled.score_latents(latents[:1], row, seed=0).item()
    assert call(latents[0], "", info, noise_level=None, **LOCAL)["score"] == default
    fresh = {call(latents[0], "", info, noise_seed=None, **LOCAL)["score"] for _ in range(3)}
    assert len(fresh) == 3


def test_samples_at_once(latents: Tensor, info: dict[str, Any]) -> None:
    alone = [call(latent, "", info, **LOCAL) for latent in latents]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(lambda i: call(latents[i % 2], "", info, **LOCAL), range(8)))
    assert together == alone * 4


def test_missing_and_wrong_inputs(latents: Tensor, pictures: Tensor, info: dict[str, Any]) -> None:
    embeds, pooled = info["prompt_embeds"], info["pooled_prompt_embeds"]
    cases: list[tuple[Any, Any, str]] = [
        (latents[0], None, r"no prompt_embeds, only \[\]"),
        (latents[0], {"num_turns": 1}, r"no prompt_embeds, only \['num_turns'\]"),
        (latents[0], {"prompt_embeds": embeds}, "needs pooled_prompt_embeds"),
        (latents[0], {"prompt_embeds": "text"}, "prompt_embeds is of type str"),
        (latents[0], info | {"prompt_embeds": embeds[:, :7]}, "width 7"),
        (latents[0], info | {"pooled_prompt_embeds": pooled * torch.nan}, "NaN"),
        (latents[0] * torch.nan, info, "latents holds .* NaN"),
        (latents, info, r"the latent is a torch.float32 tensor of shape \(2, 16, 8, 8\): it must be one"),
        (latents[0, :4], info, r"must be in \[0, 1\]"),
        (pictures[0], info | {"latents_clean": latents[0, :4]}, "4 channels"),
        (pictures[0], info | {"latents_clean": [1.0]}, "latents_clean is of type list"),
        (pictures[0, 0], info, r"solution_image is a torch.uint8 tensor of shape \(64, 64\)"),
        ("a.png", info, "solution_image is of type str"),
        (
            pictures,
            info,
            r"shape \(2, 3, 64, 64\), a video of 2 frames: this reward's backbone takes pictures",
        ),
    ]
    for image, extra_info, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            call(image, "a red circle", extra_info, **LOCAL)
    with pytest.raises(InvalidInputError, match=r"noise_levels = 1\.2"):
        call(latents[0], "", info, noise_level=1.2, **LOCAL)


def test_videos_where_the_backbone_takes_them(family_folders: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = family_folders("wan")
    model = make_family_reward(pipeline).eval()
    model.trained = True
    folder = model.save_pretrained(tmp_path / "wan")
    settings = {"reward": str(folder), "pipeline": str(pipeline), "device": "cpu"}
    video = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    prompt = "a red circle on a gray background"
    expected = model.score(prompt, [video.permute(1, 0, 2, 3)], 0.4, 0).scores.item()
    assert call(video, prompt, None, **settings)["score"] == pytest.approx(expected, abs=1e-5)

    latent, row = model.encode_images([video.permute(1, 0, 2, 3)])[0], model.encode_prompts([prompt])
    info = {"latents_clean": latent, "prompt_embeds": row.prompt_embeds[0]}
    assert latent.ndim == 4
    assert call(video, "", info, **settings)["score"] == pytest.approx(expected, abs=1e-5)


# --- by a server


def test_a_server_scores_as_the_reward_here(
    server: Server, latents: Tensor, pictures: Tensor, info: dict[str, Any]
) -> None:
    settings = {"noise_level": 0.3, "noise_seed": 4, "score_scale": 0.1, "score_bias": 1.0}
    here = call(latents[0], "", info, **settings, **LOCAL)
    assert call(latents[0], "", info, server_url=server.url, **settings) == here
    both = info | {"latents_clean": latents[0]}
    assert call(pictures[0], "", both, server_url=server.url, **settings) == here
    (_, first), _ = server.requests
    shapes = {name: tuple(tensor.shape) for name, tensor in first.items()}
    assert shapes["latents"] == (1, 16, 8, 8)
    assert shapes["u"] == shapes["seeds"] == (1,)
    assert first["u"].item() == pytest.approx(0.3)
    assert first["seeds"].item() == 4


def test_a_server_loads_nothing_here(
    server: Server, latents: Tensor, info: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(verl_omni, "local_reward")
    call(latents[0], "", info, server_url=server.url, noise_seed=None)
    assert "seeds" not in server.requests[0][1]


def test_what_a_server_is_not_asked(
    server: Server, latents: Tensor, pictures: Tensor, info: dict[str, Any]
) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (pictures[0], info, {}, "a server scores latents, so set output_type to latent or both"),
        (latents[0], {}, {}, "no prompt_embeds"),
        (latents[0], {"prompt_embeds": info["prompt_embeds"]}, {}, "pooled_prompt_embeds are missing"),
        (latents[0], info, {"noise_level": [0.2, 0.5]}, r"\[0.2, 0.5\]: a server takes one number"),
        (latents[0], info, {"noise_level": 1.2}, r"noise_level = 1.2 is outside \[0, 1\]"),
    ]
    for image, extra_info, settings, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            call(image, "a red circle", extra_info, server_url=server.url, **settings)
    assert server.requests == []


def test_failures_of_a_server_are_raised(
    server: Server, latents: Tensor, info: dict[str, Any], waits: list[float]
) -> None:
    server.replies = [ok({"protocol_version": "1", "raw_scores": [float("nan")]})]
    with pytest.raises(ScoringError, match="expected 1 finite numbers"):
        call(latents[0], "", info, server_url=server.url)
    server.replies = [None] * 2
    with pytest.raises(ScoringError, match="no score in 2 attempts"):
        call(latents[0], "", info, server_url=server.url, max_retries=1)
    assert len(waits) == 1


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_levels": 0.9}, "'noise_levels' is no setting of compute_score: did you mean noise_level?"),
        ({"timeout": 5}, "did you mean timeout_seconds?"),
        ({"retry_backoff": 0.5}, "'retry_backoff' is no setting"),
        ({"scale": 0.1}, "did you mean score_scale?"),
        ({"max_retries": 3}, "max_retries = 3 has no effect without server_url"),
        ({"timeout_seconds": 3.0}, "timeout_seconds = 3.0 has no effect without server_url"),
        ({"server_url": "http://127.0.0.1:9/v1/score"}, "reward = 'bundled' has no effect with server_url"),
    ],
)
def test_settings_that_nobody_reads_are_refused(
    settings: dict[str, Any], message: str, latents: Tensor, info: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        call(latents[0], "", info, **LOCAL, **settings)
