"""Flow-GRPO: every prompt's pictures compete, and the stochastic steps that led to the better ones gain.

    A = (r - mean) / std within the pictures of a prompt
    w = pi(z' | z) / pi_old(z' | z) of each stochastic step, a ratio of Gaussians
    loss = max(-A w, -A clip(w)) + beta KL(pi || pi_ref)

A latent reward can also score the noisy state that a step leads to, at that state's own noise level: with
`dense` every step has an advantage of its own. Rewards on pixels cannot do that.

Flow-GRPO's public code differs from its paper, and so do the defaults here: its settings are
`advantages = "uncentred"`, `log_probability = "unscaled"` with the cps rule, and, for GRPO-Guard,
`normalise_ratio` and `divide_by_dt`.

Source: Flow-GRPO arXiv:2505.05470; GRPO-Guard arXiv:2510.22319; dense rewards as in arXiv:2605.25661.
"""

from typing import Any

import torch
from torch import Tensor

from dina_lrm.alignment.config import GrpoConfig
from dina_lrm.alignment.record import Measures
from dina_lrm.alignment.run import Run
from dina_lrm.core.preference import (
    clipped_policy_loss,
    group_advantages,
    normalised_log_ratio,
    reward_groups,
)
from dina_lrm.core.transitions import gaussian_divergence, gaussian_log_prob, unscaled_log_prob
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.rewards import LatentReward, RewardSum
from dina_lrm.sampling.rollout import Trajectory, transition_at

__all__ = ["Grpo"]

_MEASURED = ("loss", "clipped", "ratio", "divergence", "gradient_norm")


class Grpo:
    """The algorithm; one call is one update: a rollout, and `minibatches` optimizer steps on it."""

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config

    def __call__(self, run: Run, step: int) -> Measures:
        config = self.config
        prompts, seeds = run.draw(step, per_prompt=config.group_size)
        first = seeds
        if config.same_noise:
            first = [seeds[row - row % config.group_size] for row in range(len(seeds))]
        path = run.rollout(prompts, first, step_seeds=seeds)
        rewards = run.score(path.clean, prompts, first)
        advantages = self._advantages(run, path, prompts, rewards)
        totals: dict[str, float] = dict.fromkeys(_MEASURED, 0.0)
        rounds = config.epochs * config.minibatches
        # All processes learn, or none: rows without an advantage are part of the mean, and of the divergence.
        if run.processes.any(bool((advantages != 0).any())):
            for rows in torch.arange(len(prompts)).tensor_split(config.minibatches) * config.epochs:
                for name, value in self._learn(run, path, prompts, advantages, rows).items():
                    totals[name] += value / rounds
        groups = reward_groups(rewards.unflatten(0, (-1, config.group_size)))
        return {
            "reward": float(rewards.float().mean()),
            "reward_std": float(groups.std.mean()),
            "flat_groups": float(groups.flat.float().mean()),
            **totals,
        }

    def _advantages(self, run: Run, path: Trajectory, prompts: list[str], rewards: Tensor) -> Tensor:
        """(stochastic step, picture)"""
        config = self.config

        def within_groups(scores: Tensor) -> Tensor:
            groups = scores.unflatten(0, (-1, config.group_size))
            settings: dict[str, Any] = {"over": config.advantages, "limit": config.advantage_limit}
            if config.advantages == "group":
                return group_advantages(groups, **settings).flatten()
            batch = run.processes.gather(groups.float()).to(groups)  # the batch is that of all processes
            advantages = group_advantages(batch.flatten(0, 1), **settings).view_as(batch)
            return advantages[run.processes.index].flatten()

        if not config.dense:
            return within_groups(rewards).expand(len(path.steps), -1)
        if not isinstance(run.reward, LatentReward | RewardSum):
            raise InvalidInputError("dense needs latent rewards: only they score noisy states")
        found = []
        for at in path.steps:
            timestep = path.grid.timesteps[at + 1].expand(len(prompts)) if at + 1 < len(path.grid) else None
            scores = rewards
            if timestep is not None:
                with torch.no_grad(), run.policy.precision(config.precision):
                    scores = torch.cat(
                        [
                            run.reward.of_state(path.states[at + 1][rows], prompts[rows], timestep[rows])
                            for rows in run.chunks(len(prompts))
                        ]
                    )
            found.append(within_groups(scores))
        return torch.stack(found)

    def _learn(
        self, run: Run, path: Trajectory, prompts: list[str], advantages: Tensor, rows: Tensor
    ) -> dict[str, float]:
        """One optimizer step on all stochastic steps of some pictures."""
        config, policy = self.config, run.policy
        conditioning = policy.encode(prompts)
        sums = torch.zeros(4)
        for place, at in enumerate(path.steps):
            for chunk in run.chunks(len(rows)):
                index = rows[chunk].to(policy.device)
                share = len(index) / (len(rows) * len(path.steps))
                own, state = conditioning.index_select(index), path.states[at][index]
                with policy.precision(config.precision):
                    where = transition_at(policy, state, own, path.grid, at, config.sampler)
                after, old_mean = path.states[at + 1][index], path.means[at][index]
                if config.log_probability == "gaussian":
                    log_ratio = gaussian_log_prob(after, where) - path.log_probs[at][index]
                else:
                    log_ratio = unscaled_log_prob(after, where.mean) - unscaled_log_prob(after, old_mean)
                if config.normalise_ratio:
                    log_ratio = normalised_log_ratio(log_ratio, where.mean, old_mean, where.std)
                loss, clipped = clipped_policy_loss(
                    log_ratio, advantages[place][index], clip_range=config.clip_range
                )
                divergence = torch.zeros_like(loss)
                if config.divergence_weight > 0:
                    with torch.no_grad(), policy.reference(), policy.precision(config.precision):
                        theirs = transition_at(policy, state, own, path.grid, at, config.sampler)
                    divergence = gaussian_divergence(where, theirs)
                if config.divide_by_dt:
                    dt = path.grid.sigmas[at] - path.grid.sigmas[at + 1]
                    loss, divergence = loss / dt, divergence / dt
                run.backward(share * (loss + config.divergence_weight * divergence).mean())
                measured = [loss.mean(), clipped.float().mean(), log_ratio.exp().mean(), divergence.mean()]
                sums += share * torch.stack(measured).detach().cpu()
        return dict(zip(_MEASURED, [*sums.tolist(), run.learn()], strict=True))
