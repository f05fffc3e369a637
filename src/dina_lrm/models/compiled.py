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

from dina_lrm.models.head import RewardHead

__all__ = ["CompiledRegions"]


class CompiledRegions:
    """Runs blocks and head compiled. Copies and pickles of it start anew, and find what torch has kept.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._regions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A `RunBlock`. A block whose call somebody else has changed (hooks, offloading) runs as it is."""
        if "forward" in vars(block) or block._forward_hooks or block._forward_pre_hooks:
            return block(*args, **kwargs)
        return self._region(type(block).forward)(block, *args, **kwargs)

    def aggregate(self, head: RewardHead, *args: Any) -> Any:
        """`RewardHead.aggregate`."""
        return self._region(RewardHead.aggregate)(head, *args)

    def score_tokens(self, head: RewardHead, *args: Any) -> Any:
        """`RewardHead.score_tokens`."""
        return self._region(RewardHead.score_tokens)(head, *args)

    def _region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._regions:
            self._regions[function] = torch.compile(function, backend=self.backend)
        return self._regions[function]

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledRegions, (self.backend,)
