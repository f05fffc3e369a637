"""A score's forward pass through torch.compile: one region for each kind of block, and the head's two steps.

Weights are arguments of a region, so all blocks of a class share its code, and all models of a family do: a
backbone of twelve equal blocks is compiled once. First sizes are compiled as they are; where sizes change
torch makes them symbolic, and the region is compiled once more. Torch keeps what it compiled on disk, for the
next process (TORCHINDUCTOR_CACHE_DIR).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Regions"]


class Regions:
    """Runs blocks and head, compiled or as they are. What somebody else has put in the place of a method, by
    hooks or on the instance (offloading, FSDP), is left alone. Copies and pickles compile anew, and find what
    torch has kept.

    Args:
        backend: of `torch.compile`; None: nothing is compiled.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self._regions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A `RunBlock`."""
        hooked = block._forward_hooks or block._forward_pre_hooks
        if self.backend is None or hooked or "forward" in vars(block):
            return block(*args, **kwargs)
        return self._region(type(block).forward)(block, *args, **kwargs)

    def method(self, module: nn.Module, name: str, *args: Any) -> Any:
        """`module.name(*args)`."""
        if self.backend is None or name in vars(module):
            return getattr(module, name)(*args)
        return self._region(getattr(type(module), name))(module, *args)

    def _region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._regions:
            assert self.backend is not None
            self._regions[function] = torch.compile(function, backend=self.backend)
        return self._regions[function]

    def __reduce__(self) -> tuple[Any, ...]:
        return Regions, (self.backend,)
