"""Reward gradients through the last steps of sampling: ReFL, DRaFT-K, AlignProp.

    loss = - mean r(z0)  +  w_d mean |u - u_ref|^2  +  w_p mean |u(z_sigma) - (eps - z0_ref)|^2

z0 comes from `gradient_steps` differentiable steps after steps without gradient, or, with `random_stop`, from
the clean latents predicted some steps before the end. The reward reads latents: its gradient never crosses
the VAE. The last term is the pretraining loss on pictures of the reference (w_p = `pretraining_weight`).

Source: ReFL arXiv:2304.05977, algorithm 1; AlignProp arXiv:2310.03739; DRaFT arXiv:2309.17400.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dina_lrm.alignment.config import ReflConfig
from dina_lrm.alignment.record import Measures
from dina_lrm.alignment.run import Run
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.flow import clean_and_noise, prediction_error
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.transitions import transition
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.policy import Grid
from dina_lrm.sampling.rewards import checked
from dina_lrm.sampling.rollout import deterministic, first_noise, transition_at

__all__ = ["Refl"]


class Refl:
    """The algorithm; one call is one update."""

    def __init__(self, config: ReflConfig) -> None:
        steps = config.sampler.num_steps
        if not 1 <= config.gradient_steps <= steps or not 0 <= config.random_stop < steps:
            raise InvalidInputError(
                f"gradient_steps = {config.gradient_steps}, random_stop = {config.random_stop}: must be in "
                f"[1, {steps}] and [0, {steps - 1}] with {steps} sampling steps"
            )
        if config.gradient_steps + config.random_stop > steps:
            raise InvalidInputError("gradient_steps + random_stop exceed the sampling steps")
        self.config = config

    def __call__(self, run: Run, step: int) -> Measures:
        config = self.config
        prompts, seeds = run.draw(step)
        generator = torch.Generator().manual_seed(mix_seeds(config.seed, Stream.REFL_STOP, step))
        stop = int(torch.randint(config.random_stop + 1, (), generator=generator))
        steps = config.gradient_steps
        if config.random_gradient_steps:
            steps = 1 + int(torch.randint(steps, (), generator=generator))
        rewards: list[Tensor] = []
        divergence = pretraining = 0.0
        for rows in run.chunks(len(prompts)):
            share = (rows.stop - rows.start) / len(prompts)
            own, own_seeds = prompts[rows], seeds[rows]
            with run.policy.precision(config.precision):
                clean, distance = self._sample(run, own, own_seeds, stop, steps)
                reward = checked(run.reward(clean, own, own_seeds).float(), own)
            run.backward(share * (config.divergence_weight * distance - reward.mean()))
            rewards.append(reward.detach())
            divergence += share * float(distance.detach())
            if config.pretraining_weight > 0:
                loss = self._pretraining_loss(run, own, own_seeds)
                run.backward(share * config.pretraining_weight * loss)
                pretraining += share * float(loss.detach())
        norm = run.learn()
        measures = {"reward": float(torch.cat(rewards).mean()), "gradient_norm": norm}
        if config.divergence_weight > 0:
            measures["divergence"] = divergence
        if config.pretraining_weight > 0:
            measures["pretraining_loss"] = pretraining
        return measures

    def _sample(
        self, run: Run, prompts: Sequence[str], seeds: Sequence[int], stop: int, gradient_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Clean latents with gradient through `gradient_steps`, and the squared distance of predictions to
        the reference."""
        policy, sampler = run.policy, deterministic(self.config.sampler)
        conditioning = policy.encode(prompts)
        shape = policy.latent_shape(sampler.height, sampler.width)
        grid = policy.grid(sampler.num_steps, shape)
        last = sampler.num_steps - stop
        first = last - gradient_steps
        state = first_noise(shape, seeds).to(policy.device)
        with torch.no_grad():
            for step in range(first):
                state = transition_at(policy, state, conditioning, grid, step, sampler).mean
        distance = state.new_zeros(())
        for step in range(first, last):
            prediction = self._prediction(run, state, conditioning, grid, step)
            if self.config.divergence_weight > 0:
                with torch.no_grad(), policy.reference():
                    theirs = self._prediction(run, state, conditioning, grid, step)
                distance = distance + (prediction - theirs).square().mean() / gradient_steps
            sigma = grid.sigmas[step].expand(len(state))
            if step == last - 1:
                return clean_and_noise(state, prediction, sigma, kind=policy.kind).clean, distance
            after = grid.sigmas[step + 1].expand(len(state))
            state = transition(state, prediction, sigma, after, kind=policy.kind).mean
        raise AssertionError("at least one step has a gradient")

    def _prediction(
        self, run: Run, state: Tensor, conditioning: Conditioning, grid: Grid, step: int
    ) -> Tensor:
        timestep = grid.timesteps[step].expand(len(state))
        scale = self.config.sampler.guidance_scale
        return run.policy.predict(state, conditioning, timestep, guidance_scale=scale)

    def _pretraining_loss(self, run: Run, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Error of the network's prediction on noisy latents of the reference, as in its own training."""
        policy = run.policy
        fresh = [mix_seeds(seed, Stream.PRETRAINING) for seed in seeds]
        with policy.reference():
            clean = run.sample(prompts, fresh)
        # From each picture's own seed, so that it does not matter what it is batched with.
        noise = first_noise(
            clean.shape[1:], [mix_seeds(seed, Stream.PRETRAINING_NOISE) for seed in fresh]
        ).to(policy.device)
        generators = [
            torch.Generator().manual_seed(mix_seeds(seed, Stream.PRETRAINING_LEVEL)) for seed in fresh
        ]
        wanted = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        level = policy.schedule.match(wanted.to(policy.device))
        noisy = policy.schedule.add_noise(clean, noise, level.sigma)
        with policy.precision(self.config.precision):
            predicted = policy.predict(noisy, policy.encode(prompts), level.timestep)
        return prediction_error(noisy, predicted, level.sigma, clean, noise, kind=policy.kind).mean()
