"""Better samples without training: choose among several while they are being sampled, or steer one.

    result = best_of_n(policy, model, prompt, samples=16)
    result = successive_halving(policy, model, prompt, samples=16)
    result = guided(policy, model, prompt, samples=4, strength=0.1)

`successive_halving` scores the candidates while they are noisy: the clean latent that the denoiser predicts
at a step, which costs nothing, is scored at one low noise level, and the reward's likelihood with the
variance v(sigma) of the state's own level gives the probability that the leading candidate is preferred to
another. Where that is high enough the other is not sampled further. The reward of the noisy state itself
ranks worse at every step.

Inside a diffusers pipeline the same two are callbacks:

    prune = Pruner(model, prompt, steps=28)
    pipeline(prompt, num_images_per_prompt=16, callback_on_step_end=prune,
             callback_on_step_end_tensor_inputs=prune.tensor_inputs(pipeline))

Own work; that latents are pruned by a reward at their noise level: LatSearch, arXiv:2603.14526.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.sampling.callbacks import Guide, Pruner
from dina_lrm.sampling.candidates import check_steps, gradient_step, score_predicted, to_drop
from dina_lrm.sampling.policy import Grid, Policy
from dina_lrm.sampling.rewards import checked
from dina_lrm.sampling.rollout import SamplerConfig, advance, deterministic, first_noise, sample

__all__ = ["Guide", "Pruner", "SearchResult", "best_of_n", "guided", "successive_halving"]


DRAFT_STEPS = 10
"""Steps of the grid that candidates are compared on."""


@dataclass(frozen=True)
class SearchResult:
    """Candidates that were sampled to the end, best first."""

    latents: Tensor
    """(kept, channel, height, width), clean."""
    scores: Tensor
    """(kept,), of the reward."""
    indices: tuple[int, ...]
    """Which of the candidates they are; candidate i starts from a seed that depends on (seed, i) alone."""
    evaluations: float
    """Passes of the whole denoiser that it took: sampling, guidance counted, and scoring, whose passes
    through the first L of N blocks count L / N (a backward pass as two forward passes)."""
    alive: tuple[int, ...]
    """Candidates that were sampled in each step, those of a draft before those of the sampler."""


def _prepared(
    policy: Policy, model: RewardModel, prompt: str, samples: int, seed: int
) -> tuple[Conditioning, Conditioning, list[int]]:
    if samples < 1:
        raise InvalidInputError(f"samples = {samples}: must be at least 1")
    if model.latent_space is not None and model.latent_space != policy.encoders.latent_space:
        raise InvalidInputError(
            f"the reward is for another generator: it reads latents of {model.latent_space}, the pipeline "
            f"has {policy.encoders.latent_space}"
        )
    seeds = [mix_seeds(seed, Stream.CANDIDATE, index) for index in range(samples)]
    return policy.encode([prompt]), model.encode_prompts(prompt), seeds


def _pass_cost(policy: Policy, model: RewardModel) -> float:
    return model.backbone.num_blocks / len(policy.backbone.architecture.block_names)


def _per_evaluation(config: SamplerConfig) -> float:
    return 1.0 if config.guidance_scale == 1.0 else 2.0


def _rows(conditioning: Conditioning, count: int, device: torch.device) -> Conditioning:
    return conditioning.index_select(torch.zeros(count, dtype=torch.long, device=device))


def _finished(
    policy: Policy,
    model: RewardModel,
    clean: Tensor,
    conditioning: Conditioning,
    prompt: str,
    seed: int,
    *,
    kept: Sequence[int],
    cost: float,
    alive: Sequence[int],
) -> SearchResult:
    """Candidates in the order of their scores under one noise sample; scoring is added to the cost."""
    scores = checked(model.score_latents(clean, conditioning, seed=seed).float(), [prompt] * len(clean))
    order = scores.argsort(descending=True, stable=True).tolist()
    cost += len(kept) * len(model.config.noise_levels) * _pass_cost(policy, model)
    return SearchResult(clean[order], scores[order], tuple(kept[row] for row in order), cost, tuple(alive))


@torch.no_grad()
def best_of_n(
    policy: Policy,
    model: RewardModel,
    prompt: str,
    *,
    samples: int = 16,
    draft: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> SearchResult:
    """Sample all candidates to the end and rank them.

    Args:
        draft: sample the candidates in so few steps, and only the best of them, from its own noise, in all:
            a sampler without noise draws nearly the same picture. None, or all steps: no draft.
    """
    config = deterministic(sampler or SamplerConfig())
    coarse = config.num_steps if draft is None else draft_steps(config.num_steps, draft)
    own, theirs, seeds = _prepared(policy, model, prompt, samples, seed)
    rows = _rows(own, samples, policy.device)
    if coarse < config.num_steps:
        rough = sample(policy, rows, seeds, replace(config, num_steps=coarse))
        scores = checked(model.score_latents(rough, theirs, seed=seed).float(), [prompt] * samples)
        best = int(scores.argmax())
        clean = sample(policy, own, [seeds[best]], config)
        alive = (samples,) * coarse + (1,) * config.num_steps
        cost = sum(alive) * _per_evaluation(config)
        cost += samples * len(model.config.noise_levels) * _pass_cost(policy, model)
        return _finished(policy, model, clean, theirs, prompt, seed, kept=[best], cost=cost, alive=alive)
    clean = sample(policy, rows, seeds, config)
    alive = (samples,) * config.num_steps
    cost = sum(alive) * _per_evaluation(config)
    return _finished(policy, model, clean, theirs, prompt, seed, kept=range(samples), cost=cost, alive=alive)


@torch.no_grad()
def successive_halving(
    policy: Policy,
    model: RewardModel,
    prompt: str,
    *,
    samples: int = 16,
    confidence: float = 0.5,
    draft: int | None = None,
    first_check: int | None = None,
    every: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> SearchResult:
    """Sample candidates together and drop those that the reward has seen enough of.

    With fewer draft steps than steps, candidates are compared on the coarse grid, where few passes lead far,
    and those that are left are sampled from their own noise on the fine one: a sampler without noise goes
    from one noise to nearly the same picture on both.

    Args:
        confidence: probability, in [0.5, 1], that the leader is preferred to a candidate at which it is
            dropped; 0.5 halves at every check.
        draft: steps of the grid that candidates are compared on, at most the sampler's, which mean no draft;
            None: 10, where the sampler has twice as many.
        first_check: steps of that grid before the first comparison; None: a fifth of them, of a draft 3.
        every: steps between comparisons; None: a tenth of them.
    """
    if not 0.5 <= confidence <= 1.0:
        raise InvalidInputError(f"confidence = {confidence}: must be in [0.5, 1]")
    config = deterministic(sampler or SamplerConfig())
    coarse = draft_steps(config.num_steps, draft)
    if first_check is None and coarse < config.num_steps:
        first_check = min(3, coarse)
    own, theirs, seeds = _prepared(policy, model, prompt, samples, seed)
    checks = check_steps(coarse, first_check, every)
    shape = policy.latent_shape(config.height, config.width)
    noise = first_noise(shape, seeds).to(policy.device)
    kept, alive = list(range(samples)), []

    def sampled(state: Tensor, grid: Grid, step: int) -> Tensor:
        alive.append(len(state))
        return advance(policy, state, _rows(own, len(state), policy.device), grid, step, config)

    grid, state, scored, step = policy.grid(coarse, shape), noise, 0, 0
    while step < checks.stop and len(kept) > 1:
        after, step = sampled(state, grid, step), step + 1
        if step in checks:
            scored += len(kept)
            sigmas = float(grid.sigmas[step - 1]), float(grid.sigmas[step])
            scores = score_predicted(model, state, after, theirs, sigmas, seed, config.batch_size)
            stay = ~to_drop(model, checked(scores, [prompt] * len(kept)), sigmas[1], confidence)
            after = after[stay]
            kept = [index for index, good in zip(kept, stay.tolist(), strict=True) if good]
        state = after
    if coarse < config.num_steps:
        grid, state, step = policy.grid(config.num_steps, shape), noise[kept], 0
    for last in range(step, config.num_steps):
        state = sampled(state, grid, last)
    cost = sum(alive) * _per_evaluation(config) + scored * _pass_cost(policy, model)
    return _finished(policy, model, state, theirs, prompt, seed, kept=kept, cost=cost, alive=alive)


def draft_steps(num_steps: int, wanted: int | None = None) -> int:
    """Steps of the grid that candidates of a sampler with `num_steps` are compared on."""
    steps = (DRAFT_STEPS if num_steps >= 2 * DRAFT_STEPS else num_steps) if wanted is None else wanted
    if not 1 <= steps <= num_steps:
        raise InvalidInputError(f"draft_steps = {steps}: must be in [1, {num_steps}]")
    return steps


@torch.no_grad()
def guided(
    policy: Policy,
    model: RewardModel,
    prompt: str,
    *,
    samples: int = 1,
    strength: float = 0.05,
    window: tuple[float, float] = (0.2, 0.9),
    seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> SearchResult:
    """Sample with the state moved along the reward's gradient after every step, without the VAE.

    Args:
        strength: size of the move, as a fraction of the noise that is left; 0 is plain sampling.
        window: noise levels between which states are moved; near 1 nothing can be told yet, near 0 only the
            reward's blind spots are found.
    """
    if not strength >= 0 or not 0 <= window[0] < window[1] <= 1:
        raise InvalidInputError(
            f"strength = {strength}, window = {window}: must be at least 0, and inside [0, 1]"
        )
    config = deterministic(sampler or SamplerConfig())
    own, theirs, seeds = _prepared(policy, model, prompt, samples, seed)
    shape = policy.latent_shape(config.height, config.width)
    grid = policy.grid(config.num_steps, shape)
    state, cost = first_noise(shape, seeds).to(policy.device), 0.0
    for step in range(config.num_steps):
        cost += samples * _per_evaluation(config)
        state = advance(policy, state, _rows(own, samples, policy.device), grid, step, config)
        sigma = float(grid.sigmas[step + 1])
        if strength > 0 and window[0] <= sigma <= window[1]:
            cost += 3.0 * samples * _pass_cost(policy, model)
            parts = [
                gradient_step(
                    model, part, theirs, grid.timesteps[step + 1].expand(len(part)), sigma, strength
                )
                for part in state.split(config.batch_size)
            ]
            state = torch.cat(parts)
    alive = (samples,) * config.num_steps
    return _finished(policy, model, state, theirs, prompt, seed, kept=range(samples), cost=cost, alive=alive)
