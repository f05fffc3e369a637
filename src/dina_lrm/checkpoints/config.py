"""What a reward model is made of, as plain data: it goes into every checkpoint and needs no torch to read."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import json_types

Tuning = Literal["lora", "frozen", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Size of the reward head (`models/head.py`)."""

    width: int | None = None
    """Channels inside the head; None: the backbone's token width. Divisible by 4 and by the heads."""
    num_queries: int = 4
    """Learned queries whose scores are averaged."""
    num_attention_heads: int = 8
    """Heads of both cross-attentions."""
    project_in: bool = False
    """Project features even where width equals the token width; always on where they differ."""
    dropout: float = 0.0
    """After attention and feed-forward, in training only."""

    def __post_init__(self) -> None:
        _require(self.width is None or self.width > 0, "head.width", self.width, "a positive integer or null")
        _require(self.num_queries > 0, "head.num_queries", self.num_queries, "at least 1")
        _require(
            self.num_attention_heads > 0, "head.num_attention_heads", self.num_attention_heads, "at least 1"
        )
        _require(0.0 <= self.dropout < 1.0, "head.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodConfig:
    """How a score margin becomes a preference probability (`core/likelihood.py`)."""

    kind: Literal["thurstone", "thurstone_constant", "bradley_terry", "bradley_terry_margin"] = "thurstone"
    """thurstone: v(sigma) = slope sigma^2 + floor; thurstone_constant: v = 0.5; the rest are logistic."""
    slope: float = 2.0
    """k of the paper; read by thurstone only."""
    floor: float = 0.05
    """v0 of the paper, so that two clean pictures differ with variance 0.1; read by thurstone only."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.slope) and self.slope >= 0, "likelihood.slope", self.slope, "at least 0")
        _require(math.isfinite(self.floor) and self.floor > 0, "likelihood.floor", self.floor, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Scale fitted on held-out pairs: P(a preferred) = Phi((score_a - score_b) / scale)."""

    noise_levels: tuple[float, ...]
    """Levels whose (ensemble) score the scale was fitted to."""
    scale: float
    """Spread of a score difference, in score units."""

    def __post_init__(self) -> None:
        _check_levels(self.noise_levels, "calibration.noise_levels")
        _require(math.isfinite(self.scale) and self.scale > 0, "calibration.scale", self.scale, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveLevels:
    """Levels learned on held-out pairs (`core.adaptive`), on which `compare` and `rank` can stop early.

    After k levels a picture's score is that of the token-level ensemble of the first k levels.
    """

    noise_levels: tuple[float, ...]
    """In the order in which they are added, each once."""
    thresholds: tuple[float, ...]
    """After each level but the last, the score difference at which a decision is final."""
    scales: tuple[float, ...]
    """After each level, P(a preferred) = Phi(difference / scale)."""
    offsets: tuple[float, ...]
    """Mean score after each level, taken off where pictures with different numbers of levels are ranked."""
    error: float
    """Share of decisions that early stops may flip, which `thresholds` were chosen for."""
    num_pairs: int
    """Held-out pairs that all of this was learned on."""

    def __post_init__(self) -> None:
        _check_levels(self.noise_levels, "adaptive.noise_levels")
        count = len(self.noise_levels)
        distinct = len(set(self.noise_levels)) == count
        _require(distinct, "adaptive.noise_levels", self.noise_levels, "without repeats")
        for name, wanted in (("thresholds", count - 1), ("scales", count), ("offsets", count)):
            values = getattr(self, name)
            good = len(values) == wanted and all(map(math.isfinite, values))
            _require(good, f"adaptive.{name}", values, f"{wanted} finite numbers")
        _require(min(self.thresholds, default=0.0) >= 0, "adaptive.thresholds", self.thresholds, "at least 0")
        _require(min(self.scales) > 0, "adaptive.scales", self.scales, "above 0")
        _require(0 < self.error < 1, "adaptive.error", self.error, "in (0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelConfig:
    """Everything needed to rebuild a reward model beside its weights."""

    backbone: Literal["sd3", "flux", "z_image", "qwen_image", "unet", "wan"] | None = None
    """Backbone family. None, in published checkpoints, which do not say it: that of the pipeline."""
    backbone_id: str | None = None
    """Pipeline the base weights come from: "bundled", a folder or a hub id."""
    num_blocks: int
    """Transformer blocks kept, from the first (L of the paper)."""
    image_taps: tuple[int, ...]
    """Blocks after which image tokens are read; 0 is the embedded tokens. Kept ascending."""
    text_taps: tuple[int, ...] = ()
    """The same for text tokens; empty: the head looks at image tokens only."""
    tuning: Tuning = "lora"
    """What is trained beside the head: LoRA on the attention projections, nothing, or every kept weight."""
    lora_rank: int = 0
    """Read only when tuning = "lora"."""
    lora_alpha: float = 0.0
    """LoRA output is scaled by lora_alpha / lora_rank."""
    lora_last_text: bool | None = None
    """Adapt the text projections of the last kept block? None: only if its text stream is tapped."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Size of the head."""
    logistic: bool = False
    """Squash the score into (-2, 2) with a logistic whose centre and slope are learned."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """Used in training, and by `compare` where no calibration is stored."""
    noise_levels: tuple[float, ...] = (0.4,)
    """Default for scoring; more than one: a token-level ensemble."""
    guidance: float | None = None
    """Guidance scale that a guidance-distilled backbone (FLUX.1 [dev]) is told; None for all others."""
    add_noise: bool = True
    """False: latents enter clean while the backbone is still told the noise level (an ablation)."""
    calibrations: tuple[Calibration, ...] = ()
    """Fitted after training, one for each level and ensemble that was validated; `compare` uses them."""
    adaptive: AdaptiveLevels | None = None
    """Learned after training by `dina-lrm evaluate --learn-levels`; adaptive `compare` and `rank` need it."""
    max_text_tokens: int | None = None
    """Tokens per prompt of the longest encoder (T5, UMT5, Qwen); None: what the backbone's pipeline reads."""

    def __post_init__(self) -> None:
        _require(self.num_blocks >= 1, "num_blocks", self.num_blocks, "at least 1")
        object.__setattr__(self, "image_taps", canonical_taps(self.image_taps, self.num_blocks, "image_taps"))
        object.__setattr__(self, "text_taps", canonical_taps(self.text_taps, self.num_blocks, "text_taps"))
        _require(len(self.image_taps) > 0, "image_taps", self.image_taps, "at least one tap")
        if self.tuning == "lora":
            _require(self.lora_rank >= 1, "lora_rank", self.lora_rank, 'at least 1 when tuning = "lora"')
            good = math.isfinite(self.lora_alpha) and self.lora_alpha > 0
            _require(good, "lora_alpha", self.lora_alpha, "above 0")
        _require(
            self.guidance is None or math.isfinite(self.guidance),
            "guidance",
            self.guidance,
            "a finite number",
        )
        _check_levels(self.noise_levels, "noise_levels")
        _require(
            self.max_text_tokens is None or self.max_text_tokens >= 1,
            "max_text_tokens",
            self.max_text_tokens,
            "at least 1",
        )

    def calibration_at(self, levels: Iterable[float]) -> Calibration | None:
        """The scale that was fitted at exactly these noise levels, in whatever order."""
        wanted = sorted(levels)
        return next((one for one in self.calibrations if sorted(one.noise_levels) == wanted), None)

    @property
    def adapts_last_text(self) -> bool:
        """Whether LoRA covers the text projections of the last kept block."""
        if self.lora_last_text is not None:
            return self.lora_last_text
        return bool(self.text_taps) and self.text_taps[-1] == self.num_blocks

    def lora_config(self) -> Any:
        """PEFT's config of the reward's adapter."""
        from dina_lrm.backbones.families import lora_config

        return lora_config(
            self.backbone,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            num_blocks=self.num_blocks,
            adapts_last_text=self.adapts_last_text,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same config back."""
        return json_types(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RewardModelConfig":
        """Read what `to_dict` wrote; an unknown, missing or wrongly typed entry is an error that names it."""
        return _from_mapping(cls, values, "model")


def canonical_taps(taps: Iterable[int], num_blocks: int, name: str) -> tuple[int, ...]:
    """Taps in ascending order, the order in which the head's weights are stored."""
    taps = tuple(taps)
    for tap in taps:
        whole = isinstance(tap, int) and not isinstance(tap, bool)
        _require(whole and 0 <= tap <= num_blocks, name, tap, f"integers from 0 to num_blocks = {num_blocks}")
    _require(len(set(taps)) == len(taps), name, taps, "without repeats")
    return tuple(sorted(taps))


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidInputError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def _check_levels(levels: tuple[float, ...], name: str) -> None:
    _require(len(levels) > 0, name, levels, "at least one level")
    for level in levels:
        _require(0.0 <= level <= 1.0, name, level, "in [0, 1]; 0 is clean, 1 is pure noise")


def _from_mapping(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InvalidInputError(f"{where} must be a mapping, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InvalidInputError(f"unknown entries in {where}: {unknown}; known are {sorted(hints)}")
    required = {
        entry.name
        for entry in dataclasses.fields(cls)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    if missing:
        raise InvalidInputError(f"missing entries in {where}: {missing}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """JSON value to the annotated type; nothing is guessed, so that a tampered file does not pass."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if origin is Literal:
        _require(value in typing.get_args(hint), where, value, f"one of {list(typing.get_args(hint))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), where, value, "a list")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        return _from_mapping(hint, value, where)
    if hint is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), where, value, "a number")
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), where, value, "an integer")
    else:
        _require(isinstance(value, hint), where, value, f"of type {hint.__name__}")
    return value
