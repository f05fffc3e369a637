"""Settings of alignment runs: what all algorithms share, and what each adds.

Plain frozen dataclasses, as in `training/config.py`: recipes are functions that return one, the command line
turns every field into a flag and the string under it into its help.
"""

from dataclasses import dataclass, field
from typing import Literal

from dina_lrm.errors import InvalidInputError
from dina_lrm.remote.transport import is_address
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.sampling.rollout import SamplerConfig

__all__ = [
    "AlignConfig",
    "DpoConfig",
    "GrpoConfig",
    "MonitorConfig",
    "PolicyConfig",
    "ReflConfig",
    "RewardConfig",
    "SamplerConfig",
    "StepDpoConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The generator that is aligned."""

    pipeline: str = "bundled"
    """"bundled", a folder in diffusers format, or a hub id."""
    lora_rank: int = 16
    """Rank of the adapter that is trained, on the attention projections of all blocks."""
    lora_alpha: float | None = None
    """The adapter is scaled by lora_alpha / lora_rank; None: twice the rank."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen base weights; the adapter is float32 always."""
    max_text_tokens: int | None = None
    """Longest prompt of the main text encoder, in tokens; None: the pipeline's own limit."""
    gradient_checkpointing: bool = False
    """Compute the policy's blocks again in the backward pass instead of keeping their activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """What is maximised: a weighted sum of latent rewards."""

    models: tuple[str, ...] = ("bundled",)
    """Each "bundled", a run folder, a hub id, or the http(s) address of a reward server. A server has no
    gradient and scores no noisy states: for grpo without `dense`, dpo, and step-dpo with preference =
    "trajectory". Its token is read from the environment variable DINA_LRM_TOKEN."""
    weights: tuple[float, ...] = ()
    """One for each of `models`; empty: 1 each. Advantages of grpo and orders of dpo do not change when all
    weights are multiplied; the gradient of refl does."""
    noise_levels: tuple[float, ...] = ()
    """Several are one token-level ensemble, which servers do not have; empty: each reward's own default, and
    0.4 of a server."""
    share: bool = True
    """Rewards whose backbone is the policy's own use its weights in memory (`RewardModel.attach`)."""
    compile: bool = False
    """Compile the rewards' blocks and heads: the first update waits for it, the next ones are faster."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Those of `models` that are addresses."""
        return tuple(filter(is_address, self.models))

    def resolved_weights(self) -> tuple[float, ...]:
        """A weight for each of `models`.

        Raises:
            InvalidInputError: another number of them.
        """
        if self.weights and len(self.weights) != len(self.models):
            raise InvalidInputError(f"reward.weights = {self.weights} for {len(self.models)} reward.models")
        return self.weights or (1.0,) * len(self.models)


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """Is the gain real? Measured on held-out prompts with fixed seeds, the average weights in use."""

    every: int = 10
    """Updates between evaluations; there is one before the first update and one after the last."""
    num_prompts: int = 64
    """Held-out prompts, one picture each; the bundled domain makes them, others are read from `prompts`."""
    prompts: str | None = None
    """File of held-out prompts (.txt, one a line, or .jsonl with "prompt"); None: the last of the training
    file's prompts, which are then not trained on."""
    gold: tuple[str, ...] = ("judge",)
    """Independent scores, NAME or NAME=LOCATION: "judge" (bundled domain), or any scorer of the baselines
    guide. The first one is the gold score. Empty: none, and no warning can come."""
    on_overoptimisation: Literal["warn", "stop"] = "warn"
    """What to do when the policy over-optimises the reward: proxy and gold diverge (`alignment.gold`)."""
    window: int = 3
    """Evaluations over which proxy and gold are compared. The chance of a false alarm in a run is at most
    5 %, shared by all its evaluations: the more there are, the less each of them sees."""
    grid_size: int = 8
    """Prompts whose pictures are kept at every evaluation, four pictures of each for the diversity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig:
    """What all alignment algorithms share."""

    policy: PolicyConfig = PolicyConfig()
    """The generator."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How it samples, in training and in evaluation (there always without noise)."""
    reward: RewardConfig = RewardConfig()
    """What is maximised."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, weight_decay=0.0, ema_decay=0.9)
    )
    """AdamW on the adapter, rate, average of the weights."""
    monitor: MonitorConfig = MonitorConfig()
    """Gold against proxy."""

    prompts: str = "shapes"
    """Training prompts: "shapes" (made on the spot), or a file: .txt, one a line, or .jsonl with "prompt"."""
    output: str | None = None
    """Folder of the run. None writes nothing."""
    resume: bool = False
    """Go on from OUTPUT/last, to the same numbers as a run that was never stopped."""
    seed: int = 0
    """Prompts, noise and new weights follow from it."""
    num_steps: int = 100
    """Updates: rollouts and what is learned from them."""
    batch_size: int = 16
    """Pictures per update that enter the loss; for grpo, dpo and step-dpo: prompts."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the network's matrix products, in sampling and training."""
    max_loss_rows: int = 32
    """Rows of a forward pass that keeps activations; larger batches are accumulated."""
    gradient_limit: float = 1e5
    """A gradient norm above it, before clipping, ends the run: the last good checkpoint is kept."""
    checkpoint_every: int = 10
    """Updates between writes of OUTPUT/last."""
    cpu: bool = False
    """Run on the CPU although an accelerator is present."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "max_loss_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.monitor.every < 1 or self.monitor.num_prompts < 2 or self.monitor.window < 2:
            raise InvalidInputError("monitor: every must be at least 1, num_prompts and window at least 2")
        if not self.reward.models:
            raise InvalidInputError("reward.models is empty: name at least one reward")
        if self.reward.servers and len(self.reward.noise_levels) > 1:
            raise InvalidInputError(
                f"reward.noise_levels = {self.reward.noise_levels}: {self.reward.servers[0]} is a server, "
                f"which scores at one level"
            )
        if self.policy.lora_rank < 1:
            raise InvalidInputError(f"policy.lora_rank = {self.policy.lora_rank}: must be at least 1")

    def _refuse_servers(self, reason: str) -> None:
        """For what only a reward in memory can do."""
        if self.reward.servers:
            raise InvalidInputError(
                f"reward.models: {self.reward.servers[0]} is a server, and {reason}: name bundled, a run "
                f"folder or a hub id"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflConfig(AlignConfig):
    """Reward gradients through the last steps of sampling (ReFL; AlignProp and DRaFT-K by its settings).

    ReFL: gradient_steps = 1, random_stop > 0. DRaFT-K: gradient_steps = K. DRaFT: gradient_steps = num_steps.
    AlignProp: the same with random_gradient_steps.
    """

    gradient_steps: int = 1
    """Last steps that the gradient goes through."""
    random_gradient_steps: bool = False
    """Draw how many at each update, from 1 to gradient_steps (AlignProp's randomised truncation)."""
    random_stop: int = 0
    """Stop up to so many steps before the end, at random, and score the predicted clean latents there."""
    divergence_weight: float = 0.0
    """Weight of the squared distance between the predictions of policy and reference."""
    pretraining_weight: float = 0.0
    """Weight of the flow-matching (denoising) loss on latents of the reference, against drift."""

    def __post_init__(self) -> None:
        super(ReflConfig, self).__post_init__()
        self._refuse_servers("refl needs the reward's gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig(AlignConfig):
    """Group-relative policy optimisation of a stochastic sampler (Flow-GRPO)."""

    group_size: int = 8
    """Pictures per prompt."""
    same_noise: bool = False
    """A prompt's pictures start from one first noise and differ by the noise of their steps alone, so that
    rewards tell about what is learned; otherwise each has a first noise of its own, as in Flow-GRPO."""
    clip_range: float = 1e-3
    """Trusted range of the ratio around 1; log-probabilities are means over elements, so it is small."""
    log_probability: Literal["gaussian", "unscaled"] = "gaussian"
    """unscaled: without 1 / (2 std^2), as Flow-GRPO's code has it for cps; clip_range is then in its
    units."""
    advantages: Literal["group", "batch", "uncentred"] = "group"
    """Divide by each group's standard deviation, by that of all rewards less their group's mean, or by that
    of all rewards (the global std of Flow-GRPO's code)."""
    advantage_limit: float | None = 5.0
    """Advantages are clipped to +- this, as in Flow-GRPO's code; None: they are not."""
    divergence_weight: float = 0.0
    """Weight of KL(policy || reference) of the steps (Flow-GRPO's beta)."""
    dense: bool = False
    """An advantage for every step from the reward of the noisy state it leads to, at that noise level,
    instead of the clean picture's for all steps."""
    normalise_ratio: bool = False
    """GRPO-Guard's ratio normalisation; clip_range is then in its units."""
    divide_by_dt: bool = False
    """Divide the loss and the divergence of each step by |dt|, as GRPO-Guard's code does: steps then pull
    alike on the mean."""
    minibatches: int = 2
    """Optimizer steps on a rollout, each on all stochastic steps of a part of its pictures."""
    epochs: int = 1
    """Passes over a rollout."""

    def __post_init__(self) -> None:
        super(GrpoConfig, self).__post_init__()
        if self.dense:
            self._refuse_servers("dense needs scores of noisy states")
        if self.group_size < 2:
            raise InvalidInputError(
                f"group_size = {self.group_size}: a group of one picture has no advantage, give at least 2"
            )
        if self.advantage_limit is not None and not self.advantage_limit > 0:
            raise InvalidInputError(f"advantage_limit = {self.advantage_limit}: must be positive, or None")
        if self.log_probability == "unscaled" and self.normalise_ratio:
            raise InvalidInputError("normalise_ratio is for the gaussian log_probability, not for unscaled")
        if self.minibatches < 1 or self.epochs < 1:
            raise InvalidInputError(
                f"minibatches = {self.minibatches}, epochs = {self.epochs}: must be at least 1"
            )
        if not self.sampler.stochastic:
            raise InvalidInputError(
                f"grpo learns from stochastic steps: sampler.rule = {self.sampler.rule!r} with window "
                f"{self.sampler.window} has none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig(AlignConfig):
    """Diffusion-DPO on the reward's best and worst of several pictures, or on given pairs."""

    pairs: str | None = None
    """Pairs of latents (.safetensors, or a folder of `dina-lrm prepare`) instead of the policy's own."""
    samples_per_prompt: int = 4
    """Pictures of a prompt, of which the best and the worst make a pair; read only without `pairs`."""
    beta: float = 500.0
    """Strength of the reference; errors are means over elements."""
    repeats: int = 4
    """Optimizer steps on the pairs of an update, each with new noise levels and noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDpoConfig(AlignConfig):
    """Step-level preferences: branches of one noisy state, ranked by the reward at their noise level."""

    branches: int = 4
    """Next states drawn from a common ancestor, of which the best and the worst make a pair."""
    beta: float = 100.0
    """Strength of the reference; log-probabilities are means over elements."""
    preference: Literal["step", "trajectory"] = "step"
    """trajectory: D3PO, two whole trajectories of a prompt, and the winner's steps win all along."""

    def __post_init__(self) -> None:
        super(StepDpoConfig, self).__post_init__()
        if self.preference == "step":
            self._refuse_servers('preference = "step" needs scores of noisy states')
        if self.branches < 2:
            raise InvalidInputError(f"branches = {self.branches}: must be at least 2")
        if not self.sampler.stochastic:
            raise InvalidInputError(
                f"step-dpo compares stochastic steps: sampler.rule = {self.sampler.rule!r} with window "
                f"{self.sampler.window} has none"
            )
