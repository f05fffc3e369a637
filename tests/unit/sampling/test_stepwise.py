"""Sampling step by step is the pipeline's own sampling, and two do not disturb each other."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Policy
from dina_lrm.sampling.stepwise import MAX_SEED, SamplerState, check_settings, sample_stepwise
from dina_lrm.shapes.networks import MAX_TOKENS
from dina_lrm.shapes.pipeline import load_pipeline

PROMPT, OTHER = "a red circle on a gray background", "a blue square on a white background"
T = TypeVar("T")


class Counting:
    """Runs jobs where it is called, and remembers how many."""

    def __init__(self) -> None:
        self.jobs = 0

    def __call__(self, job: Callable[[], T], /) -> T:
        self.jobs += 1
        return job()


@pytest.fixture
def run() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline()


def sampling(pipeline: Any, run: Counting, prompt: str = PROMPT, **changes: Any) -> Iterator[SamplerState]:
    settings: dict[str, Any] = {"seed": 5, "num_steps": 4, "guidance_scale": 4.0} | changes
    return sample_stepwise(Policy(pipeline), prompt, run=run, **settings)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_last_state_is_the_pipelines_sample(pipeline: Any, run: Counting, guidance: float) -> None:
    expected = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=MAX_TOKENS,
        output_type="latent",
    ).images
    states = list(sampling(pipeline, run, guidance_scale=guidance))
    assert [state.step for state in states] == [0, 1, 2, 3]
    assert states[0].sigma == 1.0
    # The same step in other operations: its end is mixed again from clean latent and noise.
    torch.testing.assert_close(states[-1].clean, expected, rtol=1e-4, atol=1e-4)


def test_a_state_is_its_clean_part_and_noise(pipeline: Any, run: Counting) -> None:
    """z = (1 - sigma) z0 + sigma eps, and the next state of an Euler step has the same z0 and eps."""
    first, second, *_ = sampling(pipeline, run)
    noise = (first.noisy - (1 - first.sigma) * first.clean) / first.sigma
    expected = (1 - second.sigma) * first.clean + second.sigma * noise
    torch.testing.assert_close(second.noisy, expected, rtol=1e-4, atol=1e-4)


def test_two_at_once_do_not_disturb_each_other(pipeline: Any, run: Counting) -> None:
    alone = [list(sampling(pipeline, run)), list(sampling(pipeline, run, OTHER, num_steps=5))]
    one, two = sampling(pipeline, run), sampling(pipeline, run, OTHER, num_steps=5)
    together: tuple[list[SamplerState], list[SamplerState]] = ([], [])
    for _ in range(4):
        together[0].append(next(one))
        together[1].append(next(two))
    together[1].extend(two)
    for left, right in zip(alone, together, strict=True):
        assert torch.equal(left[-1].clean, right[-1].clean)


def test_each_step_is_one_piece_of_work(pipeline: Any, run: Counting) -> None:
    states = sampling(pipeline, run)
    next(states)
    assert run.jobs == 2  # the prompt, and one step
    assert len(list(states)) == 3
    assert run.jobs == 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": -1}, rf"seed = -1: must be a whole number in \[0, {MAX_SEED}\]"),
        ({"seed": None}, "seed: none is given"),
        ({"num_steps": 51}, r"steps = 51: must be a whole number in \[1, 50\]"),
        ({"num_steps": 2.5}, r"steps = 2.5: must be a whole number in \[1, 50\]"),
        ({"guidance_scale": 0.5}, r"guidance = 0.5: must be in \[1, 10\]"),
        ({"guidance_scale": float("nan")}, r"guidance = nan: must be in \[1, 10\]"),
    ],
)
def test_settings_outside_their_range_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        check_settings(**({"seed": 5, "num_steps": 4, "guidance_scale": 4.0} | changes))
