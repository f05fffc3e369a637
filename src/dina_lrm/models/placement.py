"""Devices and dtypes as a user names them, checked before anything is loaded."""

import torch

from dina_lrm.errors import InvalidInputError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_device(device: torch.device | str | int | None) -> torch.device | None:
    """The device, or None where none is given.

    Raises:
        InvalidInputError: there is no such device on this machine.
    """
    if device is None:
        return None
    try:
        resolved = torch.device(device)
        if resolved.type != "meta":
            torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidInputError(
            f"device = {str(device)!r} cannot be used on this machine ({reason}): "
            f"such names are cpu, cuda, cuda:1, mps"
        ) from error
    return resolved


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype, which may be given by its name, such as "bfloat16"; None where none is given.

    Raises:
        InvalidInputError: it is none of `DTYPES`.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInputError(f"dtype = {dtype!r}: it must be one of {', '.join(DTYPES)}")
    return getattr(torch, name)
