"""Settings that every run has, and any settings to and from JSON."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dina_lrm.errors import InvalidInputError

__all__ = ["OptimizerConfig", "from_dict", "to_dict"]

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its learning rate over the run, and the average of the weights."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    backbone_learning_rate: float | None = None
    """Peak rate of the backbone's trainable weights (adapters or all); None: `learning_rate`."""
    weight_decay: float = 0.01
    """Acts on weight matrices only; norms, biases, queries and embeddings are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the rate after warm-up."""
    final_fraction: float = 0.0
    """Where linear and cosine end, as a fraction of the peak."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up, with any schedule."""
    max_gradient_norm: float = 1.0
    """Clipping threshold, applied to the accumulated gradient; inf measures and does not clip."""
    ema_decay: float | None = 0.995
    """Average of the weights used in validation and saved as the model. It starts faster:
    min(ema_decay, (1 + n) / (10 + n)) after n steps. None: no average."""


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts and lists, ready for JSON.

    >>> to_dict(OptimizerConfig())["betas"]
    [0.9, 0.999]
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[ConfigT], values: Mapping[str, Any], *, path: str = "") -> ConfigT:
    """Rebuild a config from `to_dict`; an unknown key is an error that names it.

    >>> from_dict(OptimizerConfig, {"betas": [0.9, 0.95]}).betas
    (0.9, 0.95)
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InvalidInputError(
            f"unknown config field {path + unknown[0]!r}; known here: {', '.join(sorted(hints))}"
        )

    def typed(hint: Any, value: Any, where: str) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return from_dict(typing.cast(type, hint), value, path=where + ".")
        if typing.get_origin(hint) is types.UnionType and value is not None:
            return typed(
                next(arm for arm in typing.get_args(hint) if arm is not types.NoneType), value, where
            )
        if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
            return tuple(typed(typing.get_args(hint)[0], item, where) for item in value)
        return value

    return cls(**{name: typed(hints[name], value, path + name) for name, value in values.items()})
