"""A reward inside a trainer's process: loaded once, called by one thread at a time."""

import contextlib
import difflib
import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from dina_lrm.core.precision import without_autocast
from dina_lrm.core.tensors import Score
from dina_lrm.errors import InvalidInputError, ScoringError
from dina_lrm.models.placement import resolve_device, resolve_dtype
from dina_lrm.models.reward_model import RewardModel

PUBLISHED_REWARD = "liuhuohuo/DiNa-LRM-SD35M-12layers"
"""Unless a trainer says which reward it wants: the paper's, over Stable Diffusion 3.5 Medium."""

_loading = threading.Lock()


class LocalReward:
    """A reward that the threads of a trainer take in turns, outside the trainer's autocast.

    Under autocast the head would answer latents in half precision, where scores near 10 lie 0.06 apart.
    """

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def turn(self) -> Iterator[RewardModel]:
        with self.model.turn, without_autocast(self.model.device.type):
            yield self.model


def local_reward(
    reward: str | Path,
    *,
    pipeline: str | Path | None = None,
    device: torch.device | str = "cuda",
    dtype: torch.dtype | str | None = None,
) -> LocalReward:
    """The process's one reward of these arguments, loaded by whoever asks first.

    Args:
        reward, pipeline: as in `RewardModel.from_pretrained`, no live pipeline.
        dtype: of the backbone and text encoders, or its name, as "bfloat16"; float32 unless given.

    Raises:
        InvalidInputError: there is no such device or dtype.
    """
    resolve_device(device)
    own = resolve_dtype(dtype)
    with _loading:
        return _loaded(str(reward), None if pipeline is None else str(pipeline), str(device), own)


@functools.cache
def _loaded(reward: str, pipeline: str | None, device: str, dtype: torch.dtype | None) -> LocalReward:
    return LocalReward(RewardModel.from_pretrained(reward, pipeline, device=device, dtype=dtype))


def finite(scores: Score) -> Score:
    """The same scores, or a ScoringError if any is not finite: a trainer would learn from it unnoticed."""
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise ScoringError(
            f"{int(bad.sum())} of {len(scores)} scores are not finite: {scores[bad][0].item()} at index "
            f"{int(bad.nonzero()[0])}; half precision may be too narrow, try dtype = 'bfloat16' or 'float32'"
        )
    return scores


def check_pairs(prompts: Any, count: int, what: str) -> list[str]:
    """As many prompts as pictures: trainers score pair by pair, and never mean one for all."""
    if isinstance(prompts, str) or len(prompts) != count:
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise InvalidInputError(f"{given} for {count} {what}: give a list with one prompt for each")
    return list(prompts)


def check_settings(
    given: Collection[str], function: Callable[..., Any], *, known: Collection[str] = ()
) -> None:
    """A trainer's configuration is data: a setting that nobody reads is a mistake, and would go unnoticed.

    Args:
        given: names of settings. function: what they are for; its keyword-only parameters are the settings.
        known: further names that are let pass.

    Raises:
        InvalidInputError: a name that is neither; it says which one may be meant.
    """
    parameters = inspect.signature(function).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in allowed and name not in known:
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(allowed)}"
            raise InvalidInputError(f"{name!r} is no setting of {function.__name__}: {hint}")
