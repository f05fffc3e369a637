"""Tensors that FSDP2 has cut into pieces, one a process, and the way between piece and whole.

What is not cut passes through unchanged, so the same lines serve one process, DDP and FSDP2. `torch` calls a
cut tensor a DTensor; its class is imported where it is used, since that takes half a second.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["cut", "is_cut", "local", "whole"]


def is_cut(tensor: Tensor) -> bool:
    """Does this process hold a piece only?"""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The piece that this process holds, sharing its memory; a leaf that needs gradients if `tensor` does."""
    if not is_cut(tensor):
        return tensor
    piece: Any = tensor.detach()
    return piece.to_local().requires_grad_(tensor.requires_grad)


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut as `like` is; nothing is sent."""
    if not is_cut(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    layout: Any = like
    return distribute_tensor(tensor, layout.device_mesh, layout.placements, src_data_rank=None)


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor on the CPU of the main process.

    Where it is cut, every process must call this, in the same order of tensors, and all but the main process
    get an empty tensor.

    Args:
        like: given, `tensor` is the piece of something that is cut as `like` is.
    """
    layout: Any = like
    joined: Any = tensor.detach()
    if layout is not None and is_cut(layout) and not is_cut(tensor):
        from torch.distributed.tensor import DTensor

        joined = DTensor.from_local(
            joined, layout.device_mesh, layout.placements, shape=layout.shape, stride=layout.stride()
        )
    if not is_cut(joined):
        return joined.cpu()
    full = joined.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0, device="cpu")
