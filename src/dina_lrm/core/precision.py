"""Arithmetic of a forward pass: bfloat16 matrix products, and on CPUs attention as plain ones of them; and
leaving the modes of the caller that a computation must not follow."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "PlainAttention",
    "faster_precision",
    "float32_masters",
    "matrix_precision",
    "without_autocast",
    "without_inference_mode",
]


@contextlib.contextmanager
def matrix_precision(
    precision: Literal["float32", "bfloat16"], device_type: str
) -> Generator[None, None, None]:
    """Matrix products in bfloat16 inside, or, with "float32", in the precision of their operands.

    The backward pass follows the forward pass.
    """
    with contextlib.ExitStack() as stack:
        if precision == "bfloat16":
            stack.enter_context(torch.autocast(device_type, torch.bfloat16))
            if device_type == "cpu":  # the fused kernel's bfloat16 backward is five times slower there
                stack.enter_context(PlainAttention())
        yield


def faster_precision(device_type: str) -> Literal["float32", "bfloat16"]:
    """The arithmetic in which this machine multiplies faster: bfloat16, but for CPUs without instructions
    for it (AVX2 alone, say), where it takes twenty times as long and more."""
    if device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"


@contextlib.contextmanager
def without_autocast(device_type: str) -> Generator[None, None, None]:
    """Everything in the precision of its operands inside, whatever `torch.autocast` the caller is in."""
    if torch.amp.is_autocast_available(device_type):
        with torch.autocast(device_type, enabled=False):
            yield
    else:
        yield


@contextlib.contextmanager
def without_inference_mode() -> Generator[None, None, None]:
    """Tensors made inside can be used by autograd later, also where the caller is in `torch.inference_mode`.

    For whatever keeps some of them: merged weights, loaded parts, tables. No gradient is recorded there.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class PlainAttention(TorchFunctionMode):
    """While active, unmasked scaled dot-product attention is two matrix products and a softmax.

    On CPUs the fused kernel's bfloat16 backward pass is slow: with 104 tokens, 3 heads of 64 and a batch of
    64, one layer's forward and backward took 38 ms fused and 11 ms in the plain form (two cores). Same values
    up to rounding.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or len(args) != 3 or not _is_plain(options):
            return func(*args, **options)
        query, key, value = args
        scale = options.get("scale") or query.shape[-1] ** -0.5
        return (query @ key.transpose(-1, -2) * scale).softmax(dim=-1).to(value.dtype) @ value


def _is_plain(options: Mapping[str, Any]) -> bool:
    """No mask, no dropout, not causal, no grouped heads."""
    return options.get("attn_mask") is None and not any(
        options.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")
    )


def float32_masters(parameters: Iterable[nn.Parameter]) -> None:
    """Keep what is trained in float32, whatever the rest of the model is stored in.

    In bfloat16, with 8 bits of precision, a step smaller than 1/256 of a weight is rounded away.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
