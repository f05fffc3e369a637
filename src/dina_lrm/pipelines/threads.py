"""What keeps threads apart: one lock for loading in the whole process, and one for each model.

Loading takes turns because the libraries are not made for threads: while diffusers and transformers build a
network they patch module construction for the whole process, so that another thread's new weights land on the
meta device, and their lazy modules lose names when two threads import them at once. A model's own turn
protects what scoring changes in it: prompt cache, parts loaded at first use, LoRA merged and unmerged.

The order is model first, loading second: nothing that loads asks for a model's turn.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from dina_lrm.core.precision import without_inference_mode

P = ParamSpec("P")
R = TypeVar("R")


class Turn:
    """A re-entrant lock that can be pickled and copied with its owner: the copy's is new and free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()


library_lock = Turn()
"""Held by whoever imports a model class of the libraries, builds a network or fills it with weights."""


def in_turn(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that holds its object's `turn` while it runs, and keeps nothing of `torch.inference_mode`."""

    @functools.wraps(method)
    def taking_turns(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.turn, without_inference_mode():
            return method(self, *args, **kwargs)

    return taking_turns
