"""Better pictures out of a generator, by a reward: training its LoRA, or searching while it samples."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dina_lrm.sampling import search

__all__ = ["search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"dina_lrm.sampling.{name}")
