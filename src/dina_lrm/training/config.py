"""What a training run is made of: small frozen dataclasses, one per concern, nested two deep.

A run is one `TrainConfig`. The functions of `recipes/training.py` return complete ones, a variant is a
`dataclasses.replace`, the command line turns every field into a flag and the string under it into its
help. The resolved config is stored with the run. Nothing here builds anything: `build/` does.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from dina_lrm.checkpoints.config import HeadConfig
from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.config import OptimizerConfig

__all__ = [
    "DataConfig",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "NoiseConfig",
    "TrainConfig",
    "ValidationConfig",
]


MOST_STEPS = 1_000_000_000
"""Optimizer steps of a run; more is a slip of the keyboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The reward to start from: which backbone, how much of it, what is trained."""

    pipeline: str = "bundled"
    """The generator whose backbone is used: "bundled", a folder in diffusers format, or a hub id."""
    start_from: str | None = None
    """A trained reward whose weights are trained further: "bundled", a folder or a hub id. It keeps its
    blocks, taps, adapters and head: those settings must be the same. None: new weights, by the seed."""
    num_blocks: int = 6
    """Transformer blocks kept, counted from the first; the others are never loaded."""
    image_taps: tuple[int, ...] = (2, 4, 6)
    """Blocks after which image tokens are read; 0 reads them before the first block."""
    text_taps: tuple[int, ...] = (2, 4)
    """Blocks after which text tokens are read; may be empty."""
    tuning: Literal["lora", "frozen", "full"] = "lora"
    """What is trained besides the head: adapters on the kept blocks, nothing, or all kept weights."""
    lora_rank: int = 16
    """Rank of the adapters; read only when tuning = "lora"."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank; read only when tuning = "lora"."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The scoring head."""
    logistic: bool = False
    """Squash scores into (-2, 2) by a learned logistic curve."""
    guidance: float | None = None
    """Guidance scale that a guidance-distilled backbone (FLUX.1 [dev]) is told; None: 3.5 for those."""
    max_text_tokens: int | None = None
    """Longest prompt of the main text encoder (T5, UMT5, Qwen), in tokens; None: the pipeline's own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the pairs come from, and what their votes mean."""

    train: str | None = "shapes"
    """Training pairs: "shapes" (made on the spot); a folder of `dina-lrm prepare`; a latents file
    (.safetensors) or a folder of them; preference rows (.jsonl, .json, .csv, .parquet) or a folder of pairs
    (NAME.txt, NAME.chosen.png, NAME.rejected.png), which are prepared first, in OUTPUT/pairs. None: to be
    given."""
    validation: str | None = "auto"
    """Validation pairs, in the same forms. auto: shapes pairs where those are trained on, otherwise a part of
    the training pairs, set aside by prompt and picture. None: no validation, and the model stays
    uncalibrated."""
    validation_fraction: float = 0.1
    """Share of the training pairs set aside; read only when validation = "auto"."""
    max_validation_pairs: int = 2000
    """Set aside at most, whatever the share; read only when validation = "auto"."""
    train_prompts: int = 6000
    """Prompts of the shapes training pairs; read only when train = "shapes"."""
    validation_prompts: int = 500
    """Prompts of the shapes validation pairs; read only for those."""
    cache_gigabytes: float = 2.0
    """Prepared latents kept in memory by each process, and as much again of prompt embeddings."""
    labels: Literal["votes", "majority"] = "votes"
    """Train towards the share of votes for `chosen`, or towards 1 for the side with most votes.
    No effect on pairs without votes, whose target is 1 either way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """How sigma is drawn in training; scoring ignores it."""

    distribution: Literal["uniform", "logit_normal", "mode", "power", "beta", "constant"] = "uniform"
    """Law of sigma, drawn once per pair."""
    logit_mean: float = 0.0
    """Centre in logit units; read only when distribution = "logit_normal"."""
    logit_std: float = 1.0
    """Spread in logit units; read only when distribution = "logit_normal"."""
    mode_scale: float = 1.29
    """Weight of the middle of the range; read only when distribution = "mode"."""
    exponent: float = 2.0
    """sigma = r ** exponent for uniform r; read only when distribution = "power"."""
    beta_a: float = 2.0
    """First shape of the beta distribution; read only when distribution = "beta"."""
    beta_b: float = 2.0
    """Second shape of the beta distribution; read only when distribution = "beta"."""
    level: float = 0.4
    """The one level; read only when distribution = "constant"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """From two scores and a noise level to a loss (see `core.likelihood`)."""

    likelihood: Literal["thurstone", "thurstone_constant", "bradley_terry", "bradley_terry_margin"] = (
        "thurstone"
    )
    """Noise-calibrated Thurstone is the method; the others are baselines."""
    loss: Literal["fidelity", "log_likelihood"] = "fidelity"
    """Fidelity loss (the paper's), or negative log-likelihood."""
    slope: float = 2.0
    """k in v(sigma) = k sigma^2 + v0; read only when likelihood = "thurstone"."""
    floor: float = 0.05
    """v0 in v(sigma) = k sigma^2 + v0; read only when likelihood = "thurstone"."""
    variance: float = 0.5
    """Variance at every level; read only when likelihood = "thurstone_constant"."""
    margin: float = 1.0
    """Margin asked of the winner; read only when likelihood = "bradley_terry_margin"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """What is measured on validation pairs while training, and how the scoring default is chosen."""

    every: int = 200
    """Optimizer steps between validations; there is always one at the end."""
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
    """Single levels measured. The best candidate becomes the model's default for scoring."""
    ensembles: tuple[tuple[float, ...], ...] = ((0.2, 0.5, 0.7),)
    """Token-level ensembles measured and taken as candidates too."""
    patience: int | None = None
    """Stop when so many validations in a row have brought nothing better. None: never."""
    max_pairs: int = 500
    """Pairs used while training; the last validation, which chooses the default, uses them all."""
    batch_size: int = 64
    """Pairs per forward; no effect on the result."""

    @property
    def candidates(self) -> list[tuple[float, ...]]:
        """All that is measured: single levels, then ensembles."""
        return [*((level,) for level in self.noise_levels), *self.ensembles]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = ModelConfig()
    """The reward to start from."""
    data: DataConfig = DataConfig()
    """Where the pairs come from."""
    noise: NoiseConfig = NoiseConfig()
    """Noise levels of training."""
    loss: LossConfig = LossConfig()
    """Likelihood and loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer, learning rate, average of the weights."""
    validation: ValidationConfig = ValidationConfig()
    """Measurements on validation pairs."""

    output: str | None = None
    """Folder of the run: the model, metrics.jsonl, best/ and last/. None writes nothing."""
    resume: bool = False
    """Continue from OUTPUT/last, to the same numbers as a run that was never stopped."""
    seed: int = 0
    """Order of the pairs, noise levels, noise and new weights all follow from it."""
    num_steps: int = 2000
    """Optimizer steps."""
    time_budget_seconds: float | None = None
    """Stop cleanly after this long, if the steps have not ended before; the rate then decays with
    whichever of steps and seconds is further on. The last validation comes on top."""
    batch_size: int = 32
    """Pairs per optimizer step, over all devices and accumulated parts."""
    group_by_prompt: bool = False
    """Keep the pairs of a prompt together, with one noise level and one noise sample for all of them, so that
    an image is scored once however many of them it is in: 4 forwards, not 12, for the 6 pairs of 4 images."""
    accumulation_steps: int = 1
    """Parts a batch is cut into to save memory; does not change the gradient."""
    ensemble_fraction: float = 0.0
    """Share of steps on which the head reads several noise levels of a pair at once, as a token-level
    ensemble does in scoring."""
    ensemble_sizes: tuple[int, ...] = (2, 3)
    """How many levels such a step may take; read only when ensemble_fraction > 0."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass; trained weights and the loss stay in float32 always."""
    gradient_checkpointing: bool = False
    """Compute the backbone's blocks again in the backward pass instead of keeping their activations: less
    memory, more time, the same numbers."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps after."""
    cpu: bool = False
    """Train on the CPU although an accelerator is present."""
    log_every: int = 10
    """Optimizer steps per line of metrics.jsonl."""
    checkpoint_every: int = 500
    """Optimizer steps between writes of OUTPUT/last; there is always one at the end."""
    keep: Literal["best", "last"] = "best"
    """Which weights the model ends with: the best validation's, or the last. Without validation, last."""
    wandb: str | None = None
    """Project on Weights & Biases to report to, when wandb is installed. None: not reported."""
    tensorboard: bool = True
    """Write TensorBoard files to OUTPUT/tensorboard, when tensorboard is installed."""

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, value: object, allowed: str) -> None:
            if not condition:
                raise InvalidInputError(f"{field} = {value!r}: must be {allowed}")

        require(1 <= self.num_steps <= MOST_STEPS, "num_steps", self.num_steps, f"in [1, {MOST_STEPS:,}]")
        for name in ("batch_size", "accumulation_steps", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        for part, names in (
            (self.data, ("train_prompts", "validation_prompts", "max_validation_pairs")),
            (self.validation, ("every", "max_pairs", "batch_size")),
        ):
            where = "data" if part is self.data else "validation"
            for name in names:
                value = getattr(part, name)
                require(value >= 1, f"{where}.{name}", value, "at least 1")
        fraction = self.data.validation_fraction
        require(0 < fraction < 1, "data.validation_fraction", fraction, "between 0 and 1")
        cache = self.data.cache_gigabytes
        require(0 < cache < math.inf, "data.cache_gigabytes", cache, "positive")
        require(
            self.batch_size % self.accumulation_steps == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of accumulation_steps = {self.accumulation_steps}",
        )
        require(
            0.0 <= self.ensemble_fraction <= 1.0, "ensemble_fraction", self.ensemble_fraction, "in [0, 1]"
        )
        require(
            self.ensemble_fraction == 0.0 or (len(self.ensemble_sizes) > 0 and min(self.ensemble_sizes) >= 2),
            "ensemble_sizes",
            self.ensemble_sizes,
            "one or more sizes of at least 2",
        )
        budget = self.time_budget_seconds
        require(budget is None or budget > 0, "time_budget_seconds", budget, "positive, or None")
        patience = self.validation.patience
        require(patience is None or patience >= 1, "validation.patience", patience, "at least 1, or None")
        levels = [*self.validation.noise_levels, *(s for e in self.validation.ensembles for s in e)]
        for sigma in levels:
            require(0.0 <= sigma <= 1.0, "validation noise level", sigma, "in [0, 1]")
        require(len(levels) > 0, "validation.noise_levels", levels, "at least one level or ensemble")
        require(
            0 < self.optimizer.learning_rate < math.inf,
            "optimizer.learning_rate",
            self.optimizer.learning_rate,
            "positive",
        )
        require(
            self.optimizer.warmup_steps >= 0,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            "at least 0",
        )
        decay = self.optimizer.ema_decay
        require(decay is None or 0.0 <= decay < 1.0, "optimizer.ema_decay", decay, "in [0, 1), or None")
