"""Options that several commands have in common."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dina_lrm.errors import MissingComponentError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from dina_lrm import RewardModel


def parse_noise_levels(text: str) -> tuple[float, ...]:
    """Noise levels as typed.

    >>> parse_noise_levels("0.2,0.5,0.7")
    (0.2, 0.5, 0.7)
    >>> parse_noise_levels("auto")
    ()
    """
    if text == "auto":
        return ()
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"noise levels are numbers separated by commas, such as 0.2,0.5,0.7; got {text!r}"
        ) from None
    for level in levels:
        if not 0 <= level <= 1:  # a NaN fails this too
            raise ValueError(f"a noise level lies in [0, 1] (0 clean, 1 pure noise); got {level:g}")
    return levels


NoiseLevels = Annotated[
    tuple[float, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIGMA[,SIGMA...]",
        instance_from_str=lambda parts: parse_noise_levels(parts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda levels: [",".join(f"{level:g}" for level in levels) or "auto"],
    ),
]
"""`0.4` or `0.2,0.5,0.7`; empty, typed as `auto`, stands for the levels the checkpoint was chosen with."""

JsonFlag = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]
"""`--json`: one JSON object a line on stdout."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which reward, and where it runs."""

    model: Annotated[str, tyro.conf.arg(metavar="ID")] = "bundled"
    """The reward: "bundled", a folder, or a hub id."""
    pipeline: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """The generator whose backbone is read: a folder or a hub id. By default the one the checkpoint names."""
    device: str = "auto"
    """Such as cpu, cuda, cuda:1, mps. By default the first GPU, and the CPU where there is none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the backbone."""

    def load(self) -> "RewardModel":
        import torch

        from dina_lrm import RewardModel

        device = find_device(self.device)
        # Only what was asked for is passed on: the defaults belong to from_pretrained.
        options: dict[str, Any] = {} if self.pipeline is None else {"pipeline": self.pipeline}
        return RewardModel.from_pretrained(
            self.model, device=device, dtype=getattr(torch, self.dtype), **options
        )


def find_device(name: str) -> "torch.device":
    """The device called `name`, or the best one for "auto"; ValueError when there is no such device."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}; such names are cpu, cuda, cuda:1, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name!r}: {torch.cuda.device_count()} CUDA devices are visible")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("no device 'mps' on this machine")
    return device


TOKEN_VARIABLE = "DINA_LRM_TOKEN"
"""Environment variable with the token of a server, where none is typed."""


def need_packages(extra: str, *names: str) -> None:
    """MissingComponentError unless the packages of an extra can be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingComponentError(
                f"{name} is not installed: pip install 'dina-lrm[{extra}]'"
            ) from error


def scoring_levels(requested: tuple[float, ...], model: "RewardModel") -> float | list[float]:
    """What `RewardModel.score` takes: one level as a number, several as one ensemble."""
    levels = requested or tuple(model.config.noise_levels)
    return levels[0] if len(levels) == 1 else list(levels)


def read_image(path: Path, *, root: Path | None = None) -> "Image":
    """The picture in a file, in RGB; the error names the file."""
    from dina_lrm.data.pairs import load_image

    return load_image(path if root is None else root / path)
