"""Diffusion-DPO: the policy learns to denoise the preferred picture of a pair better than the other one.

Pairs are the reward's best and worst of several pictures of the current policy, or given. Both sides see the
same noise and the same level, and what counts is how much better than the reference the policy denoises each.

Source: arXiv:2311.12908, algorithm 1 and equation 14.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.alignment.config import DpoConfig
from dina_lrm.alignment.rollout import first_noise
from dina_lrm.alignment.run import Measures, Run
from dina_lrm.core.flow import prediction_error
from dina_lrm.core.preference import diffusion_dpo_loss
from dina_lrm.data.latents import mix_seeds
from dina_lrm.data.shards import PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.models.backbone import Conditioning

__all__ = ["Dpo"]

_LEVELS, _NOISE, _PAIRS = 61, 62, 63


@dataclass(frozen=True)
class _Pairs:
    chosen: Tensor
    rejected: Tensor
    conditioning: Conditioning
    seeds: list[int]


class Dpo:
    """The algorithm; one call is one update: pairs, and `repeats` optimizer steps on them.

    Args:
        pairs: given ones; None makes them of the policy's own pictures.
    """

    def __init__(self, config: DpoConfig, pairs: PairSet | None = None) -> None:
        if pairs is None and config.samples_per_prompt < 2:
            raise InvalidInputError(f"samples_per_prompt = {config.samples_per_prompt}: must be at least 2")
        if config.beta <= 0 or config.repeats < 1:
            raise InvalidInputError(
                f"beta = {config.beta}, repeats = {config.repeats}: must be above 0, at least 1"
            )
        self.config, self.pairs = config, pairs

    def __call__(self, run: Run, step: int) -> Measures:
        pairs, measures = self._draw(run, step) if self.pairs is None else self._given(run, step)
        totals = {"loss": 0.0, "accuracy": 0.0, "gradient_norm": 0.0}
        if len(pairs.seeds):
            for repeat in range(self.config.repeats):
                for name, value in self._learn(run, pairs, step, repeat).items():
                    totals[name] += value / self.config.repeats
        return measures | totals

    def _draw(self, run: Run, step: int) -> tuple[_Pairs, Measures]:
        """The best and the worst of each prompt's pictures; prompts whose pictures score alike drop out."""
        count = self.config.samples_per_prompt
        prompts, seeds = run.draw(step, per_prompt=count)
        clean = run.sample(prompts, seeds)
        rewards = run.score(clean, prompts, seeds)
        groups = rewards.unflatten(0, (-1, count))
        (high, best), (low, worst) = groups.max(dim=1), groups.min(dim=1)
        kept = (high > low).nonzero().flatten()
        start = kept * count
        latents = clean.to(run.policy.device)
        chosen_rows = [prompts[row] for row in start.tolist()]
        pairs = _Pairs(
            latents[start + best[kept]],
            latents[start + worst[kept]],
            run.policy.encode(chosen_rows or prompts[:1]),
            [seeds[row] for row in start.tolist()],
        )
        return pairs, {"reward": float(rewards.mean()), "reward_gap": float((high - low).mean())}

    def _given(self, run: Run, step: int) -> tuple[_Pairs, Measures]:
        """The next pairs of a set, in an order of its own for every pass."""
        assert self.pairs is not None
        count, size = len(self.pairs), self.config.batch_size // run.accelerator.num_processes
        first = step * self.config.batch_size + run.accelerator.process_index * size
        chosen = []
        for place in range(first, first + size):
            generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, _PAIRS, place // count))
            chosen.append(int(torch.randperm(count, generator=generator)[place % count]))
        shapes = {tuple(self.pairs.batch(torch.tensor([one])).latents_chosen.shape[1:]) for one in chosen}
        if len(shapes) > 1:
            raise InvalidInputError(f"pairs of several sizes {sorted(shapes)}: dpo takes pairs of one size")
        batch = self.pairs.batch(torch.tensor(chosen)).to(run.policy.device)
        conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask)
        wins = (batch.target >= 0.5).reshape(-1, *[1] * (batch.latents_chosen.ndim - 1))
        pairs = _Pairs(
            torch.where(wins, batch.latents_chosen, batch.latents_rejected).float(),
            torch.where(wins, batch.latents_rejected, batch.latents_chosen).float(),
            conditioning,
            [mix_seeds(self.config.seed, _NOISE, step, one) for one in chosen],
        )
        return pairs, {}

    def _learn(self, run: Run, pairs: _Pairs, step: int, repeat: int) -> dict[str, float]:
        """One optimizer step at one noise level per pair, spread evenly over all levels."""
        config, policy, count = self.config, run.policy, len(pairs.seeds)
        generator = torch.Generator().manual_seed(
            mix_seeds(config.seed, _LEVELS, step, repeat, run.accelerator.process_index)
        )
        spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        level = policy.schedule.match(spread.to(policy.device))
        noise = first_noise(
            pairs.chosen.shape[1:], [mix_seeds(seed, _NOISE, repeat) for seed in pairs.seeds]
        ).to(policy.device)
        sums = torch.zeros(2)
        for rows in run.chunks(count):
            share = (rows.stop - rows.start) / count
            index = torch.arange(rows.start, rows.stop, device=policy.device)
            own = pairs.conditioning.index_select(index)
            sigma, timestep = level.sigma[rows], level.timestep[rows]

            def errors(
                own: Conditioning = own,
                rows: slice = rows,
                sigma: Tensor = sigma,
                timestep: Tensor = timestep,
            ) -> list[Tensor]:
                found = []
                for latents in (pairs.chosen[rows], pairs.rejected[rows]):
                    noisy = policy.schedule.add_noise(latents, noise[rows], sigma)
                    with policy.precision(config.precision):
                        output = policy.predict(noisy, own, timestep)
                    found.append(
                        prediction_error(noisy, output, sigma, latents, noise[rows], kind=policy.kind)
                    )
                return found

            with torch.no_grad(), policy.reference():
                theirs = errors()
            ours = errors()
            loss = diffusion_dpo_loss(*ours, *theirs, beta=config.beta)
            run.backward(share * loss.mean())
            right = (ours[0] - ours[1]) < (theirs[0] - theirs[1])
            sums += share * torch.stack([loss.mean().detach(), right.float().mean()]).cpu()
        return {"loss": float(sums[0]), "accuracy": float(sums[1]), "gradient_norm": run.learn()}
