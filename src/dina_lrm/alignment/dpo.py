"""Diffusion-DPO: the policy learns to denoise the preferred picture of a pair better than the other one.

Pairs are the reward's best and worst of several pictures of the current policy, or given. Both sides see the
same noise and the same level, and what counts is how much better than the reference the policy denoises each.

Given pairs keep their target, the share of votes for the chosen side: the loss is that of conservative DPO,
which takes a tie back to the reference and divided votes to their share (`core.preference`).

Source: arXiv:2311.12908, algorithm 1 and equation 14.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.alignment.config import DpoConfig
from dina_lrm.alignment.record import Measures
from dina_lrm.alignment.run import Run
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.flow import prediction_error
from dina_lrm.core.noise import MatchedLevel
from dina_lrm.core.preference import diffusion_dpo_loss
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.data.shards.read import PairSet
from dina_lrm.errors import InvalidInputError
from dina_lrm.sampling.rollout import first_noise

__all__ = ["Dpo"]


@dataclass(frozen=True)
class _Pairs:
    """Those of this process."""

    chosen: Tensor
    rejected: Tensor
    target: Tensor
    conditioning: Conditioning
    seeds: list[int]
    kept: Tensor
    """Which places of this process's share of the batch have a pair."""


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
        # In the order of the batch, over all processes: (place of a process, process).
        kept = run.processes.gather(pairs.kept.long()).T
        number = (kept.flatten().cumsum(0) - 1).view_as(kept)[:, run.processes.index][pairs.kept.cpu()]
        if total := int(kept.sum()):
            for repeat in range(self.config.repeats):
                for name, value in self._learn(run, pairs, number, total, step, repeat).items():
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
        kept = high > low
        start = kept.nonzero().flatten() * count
        latents = clean.to(run.policy.device)
        chosen_rows = [prompts[row] for row in start.tolist()]
        pairs = _Pairs(
            latents[start + best[kept]],
            latents[start + worst[kept]],
            torch.ones(len(start), device=latents.device),
            run.policy.encode(chosen_rows or prompts[:1]),
            [seeds[row] for row in start.tolist()],
            kept,
        )
        gap = high.float() - low.float()
        return pairs, {"reward": float(rewards.float().mean()), "reward_gap": float(gap.mean())}

    def _given(self, run: Run, step: int) -> tuple[_Pairs, Measures]:
        """The next pairs of a set, in an order of its own for every pass."""
        assert self.pairs is not None
        count, size = len(self.pairs), self.config.batch_size
        chosen = []
        for place in range(step * size + run.processes.index, (step + 1) * size, run.processes.count):
            generator = torch.Generator().manual_seed(
                mix_seeds(self.config.seed, Stream.DPO_PAIRS, place // count)
            )
            chosen.append(int(torch.randperm(count, generator=generator)[place % count]))
        shapes = {tuple(self.pairs.batch(torch.tensor([one])).latents_chosen.shape[1:]) for one in chosen}
        if len(shapes) > 1:
            raise InvalidInputError(f"pairs of several sizes {sorted(shapes)}: dpo takes pairs of one size")
        batch = self.pairs.batch(torch.tensor(chosen)).to(run.policy.device)
        conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask)
        pairs = _Pairs(
            batch.latents_chosen,
            batch.latents_rejected,
            batch.target,
            conditioning,
            [mix_seeds(self.config.seed, Stream.DPO_NOISE, step, one) for one in chosen],
            torch.ones(len(chosen), dtype=torch.bool),
        )
        return pairs, {}

    def _learn(
        self, run: Run, pairs: _Pairs, number: Tensor, total: int, step: int, repeat: int
    ) -> dict[str, float]:
        """One optimizer step at one noise level per pair, spread evenly over all levels.

        Args:
            number: of each of this process's pairs among the `total` of all processes.
        """
        config, policy = self.config, run.policy
        generator = torch.Generator().manual_seed(mix_seeds(config.seed, Stream.DPO_LEVEL, step, repeat, 0))
        spread = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / total
        sums = torch.zeros(2)
        for rows in run.chunks(len(pairs.seeds)):
            share = (rows.stop - rows.start) * run.processes.count / total
            index = torch.arange(rows.start, rows.stop, device=policy.device)
            own = pairs.conditioning.index_select(index)
            level = policy.schedule.match(spread[number[rows]].to(policy.device))
            seeds = [mix_seeds(seed, Stream.DPO_NOISE, repeat) for seed in pairs.seeds[rows]]
            noise = first_noise(pairs.chosen.shape[1:], seeds).to(policy.device)

            def errors(
                own: Conditioning = own,
                rows: slice = rows,
                level: MatchedLevel = level,
                noise: Tensor = noise,
            ) -> list[Tensor]:
                found = []
                for latents in (pairs.chosen[rows], pairs.rejected[rows]):
                    noisy = policy.schedule.add_noise(latents, noise, level.sigma)
                    with policy.precision(config.precision):
                        output = policy.predict(noisy, own, level.timestep)
                    found.append(
                        prediction_error(noisy, output, level.sigma, latents, noise, kind=policy.kind)
                    )
                return found

            with torch.no_grad(), policy.reference():
                theirs = errors()
            ours = errors()
            target = pairs.target[rows]
            loss = diffusion_dpo_loss(*ours, *theirs, target=target, beta=config.beta)
            run.backward(share * loss.mean())
            prefers = (ours[0] - ours[1]) < (theirs[0] - theirs[1])
            right = torch.where(target == 0.5, 0.5, (prefers == (target > 0.5)).float())
            sums += share * torch.stack([loss.mean().detach(), right.mean()]).cpu()
        return {"loss": float(sums[0]), "accuracy": float(sums[1]), "gradient_norm": run.learn()}
