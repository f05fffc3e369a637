"""Alignment on a reward behind HTTP: the same run as with that reward here, and what a server cannot do."""

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx_retries.retry
import pytest
import torch

from dina_lrm import Client, InvalidInputError
from dina_lrm.alignment.config import (
    AlignConfig,
    DpoConfig,
    GrpoConfig,
    MonitorConfig,
    PolicyConfig,
    ReflConfig,
    RewardConfig,
    SamplerConfig,
    StepDpoConfig,
)
from dina_lrm.alignment.record import RunResult
from dina_lrm.build.alignment import latent_reward, run_alignment
from dina_lrm.cli.main import main
from dina_lrm.errors import ScoringError
from dina_lrm.sampling.rewards import LatentReward, RewardSum, ServerReward
from tests.families import load_pipeline, make_family_reward
from tests.unit.integrations.server import Server, serving

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
ODE = SamplerConfig(num_steps=2, height=32, width=32, batch_size=8)
CPS = replace(ODE, rule="cps", noise_level=0.5, num_steps=4)
ADDRESS = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def run_folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the reward that the server has, too."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    make_family_reward(tiny_pipeline, noise_levels=(0.4,)).save_pretrained(folder)
    return folder


@pytest.fixture
def server(tiny_pipeline: Path) -> Iterator[Server]:
    with serving(make_family_reward(tiny_pipeline, noise_levels=(0.4,)).requires_grad_(False)) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(httpx_retries.retry, "time", types.SimpleNamespace(sleep=found.append))
    return found


@pytest.fixture
def align(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., RunResult]:
    """A run on a fresh copy of the tiny pipeline, with rewards by location."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(
        kind: type[AlignConfig], *models: str, weights: tuple[float, ...] = (), **settings: Any
    ) -> RunResult:
        config = kind(
            **{
                "sampler": CPS if kind in (GrpoConfig, StepDpoConfig) else ODE,
                "policy": PolicyConfig(lora_rank=2),
                "monitor": MonitorConfig(every=9, num_prompts=2, grid_size=2, gold=()),
                "reward": RewardConfig(models=models, weights=weights),
                "prompts": str(tmp_path / "prompts.txt"),
                "num_steps": 2,
                "batch_size": 2,
                "checkpoint_every": 1,
                "precision": "float32",
                "cpu": True,
            }
            | settings
        )
        return run_alignment(config, pipeline=load_pipeline(tiny_pipeline))[1]

    return run


def proxies(result: RunResult) -> torch.Tensor:
    return torch.tensor([one.proxy for one in result.evaluations])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(GrpoConfig, {"group_size": 2}), (DpoConfig, {}), (StepDpoConfig, {"preference": "trajectory"})],
)
def test_a_run_is_that_of_the_same_reward_here(
    align: Callable[..., RunResult],
    server: Server,
    run_folder: Path,
    kind: type[AlignConfig],
    settings: dict[str, Any],
) -> None:
    there = align(kind, server.url, **settings)
    here = align(kind, str(run_folder), **settings)
    assert len(server.requests) > 3
    assert all(tensors["u"].eq(0.4).all() for _, tensors in server.requests)
    # float32 throughout; scores are alike to rounding, as the reward sees other batches.
    torch.testing.assert_close(proxies(there), proxies(here), rtol=1e-4, atol=1e-4)
    assert proxies(there)[0].tolist() != proxies(there)[-1].tolist()


def test_a_server_and_a_reward_here_by_weight(
    align: Callable[..., RunResult], server: Server, run_folder: Path
) -> None:
    alone = align(DpoConfig, str(run_folder), num_steps=1)
    mixed = align(DpoConfig, server.url, str(run_folder), weights=(2.0, -0.5), num_steps=1)
    torch.testing.assert_close(proxies(mixed)[0], 1.5 * proxies(alone)[0], rtol=1e-4, atol=1e-4)


def test_the_level_and_the_token_are_passed_on(
    align: Callable[..., RunResult], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINA_LRM_TOKEN", "secret")
    align(DpoConfig, num_steps=1, reward=RewardConfig(models=(server.url,), noise_levels=(0.25,)))
    for headers, tensors in server.requests:
        assert tensors["u"].eq(0.25).all()
        assert headers["authorization"] == "Bearer secret"


@pytest.mark.long
def test_a_server_that_fails_ends_the_run_and_keeps_the_checkpoint(
    align: Callable[..., RunResult], server: Server, tmp_path: Path, waits: list[float]
) -> None:
    whole = align(DpoConfig, server.url, output=str(tmp_path / "whole"), num_steps=3)
    per_update = len(server.requests)  # one to begin with, two evaluations, three updates
    score, asked = server.score, 0

    def fails_later(tensors: dict[str, Any]) -> Any:
        nonlocal asked
        asked += 1
        return score(tensors) if asked <= 3 else (503, {}, b'{"error": "gone"}')

    assert per_update == 6
    server.score = fails_later  # type: ignore[method-assign]
    settings: dict[str, Any] = {"output": str(tmp_path / "parts"), "num_steps": 3}
    with pytest.raises(ScoringError, match=r"6 attempts.* HTTP 503: gone"):
        align(DpoConfig, server.url, **settings)
    assert len(waits) == 5
    position = json.loads((tmp_path / "parts" / "last" / "training_state" / "position.json").read_text())
    assert position["step"] == 1
    assert not (tmp_path / "parts" / "pytorch_lora_weights.safetensors").exists()

    server.score = score  # type: ignore[method-assign]
    resumed = align(DpoConfig, server.url, resume=True, **settings)
    torch.testing.assert_close(proxies(resumed), proxies(whole), rtol=1e-4, atol=1e-4)


def test_a_server_is_asked_before_the_first_sample(
    align: Callable[..., RunResult], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = [(422, {}, b'{"error": "latents have 16 channels, this backbone takes 4"}')]
    monkeypatch.delattr("dina_lrm.alignment.run.sample")
    with pytest.raises(InvalidInputError, match="HTTP 422: latents have 16 channels"):
        align(DpoConfig, server.url, output=str(tmp_path / "run"))
    ((_, tensors),) = server.requests
    assert tensors["latents"].shape == (1, 16, 8, 8)
    assert not (tmp_path / "run").exists()


# --- what a server cannot do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ReflConfig, {}, f"{ADDRESS} is a server, and refl needs the reward's gradient"),
        (StepDpoConfig, {"sampler": CPS}, 'preference = "step" needs scores of noisy states'),
        (GrpoConfig, {"sampler": CPS, "dense": True}, "dense needs scores of noisy states"),
    ],
)
def test_what_needs_a_reward_in_memory_is_refused_at_once(
    kind: type[AlignConfig], settings: dict[str, Any], message: str
) -> None:
    for models in ((ADDRESS,), ("bundled", ADDRESS)):
        with pytest.raises(InvalidInputError, match=message):
            kind(reward=RewardConfig(models=models), **settings)


def test_ensembles_are_refused_at_once() -> None:
    reward = RewardConfig(models=(ADDRESS,), noise_levels=(0.2, 0.5))
    with pytest.raises(InvalidInputError, match=f"{ADDRESS} .*one level"):
        DpoConfig(reward=reward)


def test_a_search_has_no_server(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match=f"{ADDRESS} .*no gradient"):
        latent_reward(ADDRESS, load_pipeline(tiny_pipeline))
    assert main(["search", "a red circle on a gray background", "--model", ADDRESS]) == 2
    assert ADDRESS in capsys.readouterr().err


def test_no_gradient_and_no_noisy_states(server: Server, tiny_pipeline: Path) -> None:
    reward = LatentReward(server.model)
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts, seeds = PROMPTS[:2], [3, 4]
    with Client(server.url) as client:
        remote = ServerReward(client, server.model.encode_prompts)
        torch.testing.assert_close(remote(latents, prompts, seeds), reward(latents, prompts, seeds))
        both = RewardSum((remote, reward), (1.0, 1.0))
        with pytest.raises(InvalidInputError, match=r"server.* no gradient"):
            both(latents.clone().requires_grad_(), prompts, seeds)
        with pytest.raises(InvalidInputError, match=r"ServerReward .*noisy states"):
            both.of_state(latents, prompts, torch.full((2,), 500.0))


def test_weights_are_counted_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["align", "dpo", "shapes", "--reward", ADDRESS, "bundled", "--output", str(tmp_path / "run")]
    assert main([*arguments, "--reward.weights", "0.5"]) == 2
    assert "reward.weights = (0.5,) for 2 reward.models" in capsys.readouterr().err
