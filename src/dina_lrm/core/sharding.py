"""Tensors that FSDP2 has sharded, and the way between a shard and the full tensor.

What is not sharded passes through unchanged, so the same lines serve one process, DDP and FSDP2. `torch`
calls a sharded tensor a DTensor; its class is imported where it is used, since that takes half a second.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["full_tensor", "is_sharded", "local", "shard"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a shard only."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The shard that this process holds, in the same memory; a leaf that needs gradients if `tensor` does."""
    if not is_sharded(tensor):
        return tensor
    piece: Any = tensor.detach()
    return piece.to_local().requires_grad_(tensor.requires_grad)


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, the same in every process, as `like` is; nothing is sent."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    layout: Any = like
    return distribute_tensor(tensor, layout.device_mesh, layout.placements, src_data_rank=None)


def full_tensor(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The full tensor, on the CPU of the main process.

    Where it is sharded, every process must call this, in the same order of tensors, and all but the main
    process get an empty tensor.

    Args:
        like: given, `tensor` is the shard of something that is sharded as `like` is.
    """
    layout: Any = like
    joined: Any = tensor.detach()
    if layout is not None and is_sharded(layout) and not is_sharded(tensor):
        from torch.distributed.tensor import DTensor

        joined = DTensor.from_local(
            joined, layout.device_mesh, layout.placements, shape=layout.shape, stride=layout.stride()
        )
    if not is_sharded(joined):
        return joined.cpu()
    full = joined.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0, device="cpu")
