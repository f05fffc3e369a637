"""Step-level preferences: of several next states drawn from one noisy state, the better one is preferred.

The latent reward ranks the branches at the noise level that they are at, so no branch is sampled to the end.
The next ancestor is one of the branches, drawn at random. With preference = "trajectory" (D3PO) two whole
trajectories are drawn per prompt, from one first noise, and the winner's steps count as the better ones all
along.

Source: SPO arXiv:2406.04314; LPO arXiv:2502.01051; D3PO arXiv:2311.13231.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.alignment.config import StepDpoConfig
from dina_lrm.alignment.record import Measures
from dina_lrm.alignment.run import Run
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.preference import step_dpo_loss
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.transitions import gaussian_log_prob
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.rewards import LatentReward, RewardSum, checked
from dina_lrm.sampling.rollout import first_noise, step_at, transition_at

__all__ = ["StepDpo"]


@dataclass(frozen=True)
class _StepPairs:
    """Preferred and other next state of every prompt at one step."""

    at: int
    rows: Tensor
    """Prompts that have a preference."""
    before: tuple[Tensor, Tensor]
    """States that the preferred and the other step started from."""
    after: tuple[Tensor, Tensor]


class StepDpo:
    """The algorithm; one call is one update: a walk, and an optimizer step for each stochastic step."""

    def __init__(self, config: StepDpoConfig) -> None:
        if config.beta <= 0:
            raise InvalidInputError(f"beta = {config.beta}: must be positive")
        self.config = config

    def __call__(self, run: Run, step: int) -> Measures:
        prompts, seeds = run.draw(step)
        conditioning = run.policy.encode(prompts)
        gaps: list[float] = []
        walk = self._branches if self.config.preference == "step" else self._trajectories
        with torch.no_grad():
            pairs = list(walk(run, prompts, seeds, conditioning, gaps))
        totals = {"loss": 0.0, "accuracy": 0.0, "gradient_norm": 0.0}
        counts = run.processes.gather(torch.tensor([len(pair.rows) for pair in pairs])).sum(dim=0).tolist()
        for one, total in zip(pairs, counts, strict=True):
            if total:  # in some process
                for name, value in self._learn(run, one, total, conditioning).items():
                    totals[name] += value / len(pairs)
        return {"reward_gap": sum(gaps) / max(len(gaps), 1), **totals}

    def _branches(
        self, run: Run, prompts: list[str], seeds: list[int], conditioning: Conditioning, gaps: list[float]
    ) -> Iterator[_StepPairs]:
        config, policy, count = self.config, run.policy, self.config.branches
        reward = run.reward
        if not isinstance(reward, LatentReward | RewardSum):
            raise InvalidInputError(
                "step-level preferences need latent rewards: only they score noisy states"
            )
        shape = policy.latent_shape(config.sampler.height, config.sampler.width)
        grid = policy.grid(config.sampler.num_steps, shape)
        state = first_noise(shape, seeds).to(policy.device)
        every = torch.arange(len(prompts), device=policy.device)
        for at in range(config.sampler.stochastic.stop):
            with policy.precision(config.precision):
                where = transition_at(policy, state, conditioning, grid, at, config.sampler)
            if at not in config.sampler.stochastic:
                state = where.mean
                continue
            drawn = torch.stack(
                [
                    step_at(where, [mix_seeds(seed, Stream.BRANCH, branch) for seed in seeds], at)[0]
                    for branch in range(count)
                ]
            )
            timestep = grid.timesteps[min(at + 1, len(grid) - 1)].expand(len(prompts))
            scores = []
            for branch in drawn:
                with policy.precision(config.precision):
                    if at + 1 < len(grid):
                        found = reward.of_state(branch, prompts, timestep)
                    else:
                        found = reward(branch, prompts, seeds)
                scores.append(checked(found, prompts))
            (high, best), (low, worst) = (torch.stack(scores).max(dim=0), torch.stack(scores).min(dim=0))
            gaps.append(float((high.float() - low.float()).mean()))
            kept = (high > low).nonzero().flatten()
            after = drawn[best[kept], kept], drawn[worst[kept], kept]
            yield _StepPairs(at, kept, (state[kept], state[kept]), after)
            generator = torch.Generator().manual_seed(
                mix_seeds(config.seed, Stream.NEXT_BRANCH, run.state.step, at)
            )
            # Drawn for the whole batch, of which this process has some places.
            survivor = torch.randint(count, (config.batch_size,), generator=generator)
            own = survivor[run.processes.index :: run.processes.count].to(every.device)
            state = drawn[own, every]

    def _trajectories(
        self, run: Run, prompts: list[str], seeds: list[int], conditioning: Conditioning, gaps: list[float]
    ) -> Iterator[_StepPairs]:
        steps = [[mix_seeds(seed, Stream.BRANCH, side) for seed in seeds] for side in range(2)]
        paths = [run.rollout(prompts, seeds, step_seeds=side) for side in steps]
        scores = [run.score(path.clean, prompts, seeds) for path in paths]
        gaps.append(float((scores[0].float() - scores[1].float()).abs().mean()))
        kept = (scores[0] != scores[1]).nonzero().flatten()
        first_wins = (scores[0] > scores[1])[kept]

        def sides(index: int) -> tuple[Tensor, Tensor]:
            a, b = (path.states[index][kept] for path in paths)
            wins = first_wins.reshape(-1, *[1] * (a.ndim - 1))
            return torch.where(wins, a, b), torch.where(wins, b, a)

        for at in paths[0].steps:
            yield _StepPairs(at, kept, sides(at), sides(at + 1))

    def _learn(self, run: Run, pairs: _StepPairs, total: int, conditioning: Conditioning) -> dict[str, float]:
        """One optimizer step on one sampling step; `total` is the number of pairs of all processes."""
        config, policy = self.config, run.policy
        grid = policy.grid(config.sampler.num_steps, pairs.before[0].shape[1:])
        sums = torch.zeros(2)
        for rows in run.chunks(len(pairs.rows)):
            share = (rows.stop - rows.start) * run.processes.count / total
            own = conditioning.index_select(pairs.rows[rows])

            def log_probs(own: Conditioning = own, rows: slice = rows) -> list[Tensor]:
                found = []
                for before, after in zip(pairs.before, pairs.after, strict=True):
                    with policy.precision(config.precision):
                        where = transition_at(policy, before[rows], own, grid, pairs.at, config.sampler)
                    found.append(gaussian_log_prob(after[rows], where))
                return found

            with torch.no_grad(), policy.reference():
                theirs = log_probs()
            ours = log_probs()
            loss = step_dpo_loss(*ours, *theirs, beta=config.beta)
            run.backward(share * loss.mean())
            right = (ours[0] - ours[1]) > (theirs[0] - theirs[1])
            sums += share * torch.stack([loss.mean().detach(), right.float().mean()]).cpu()
        return {"loss": float(sums[0]), "accuracy": float(sums[1]), "gradient_norm": run.learn()}
