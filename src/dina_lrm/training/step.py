"""One optimizer step, seen from the batch: what is drawn for it, and how its pairs are scored.

The variance of a step that concatenates noise levels is v of the smallest: more levels cannot tell less
(`loss_level`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dina_lrm.backbones.backbone import call, checkpointed
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import sample_noise_levels, torch_seed
from dina_lrm.core.seeds import Stream, mix_seeds
from dina_lrm.core.tensors import NoiseLevel, Score
from dina_lrm.data.latents import PairBatch
from dina_lrm.models.head import HeadTokens
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.training.config import TrainConfig

__all__ = ["PairScorer", "StepDraws", "draw_step", "loss_level"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDraws:
    """Everything random in one optimizer step, for the whole batch."""

    sigma: Float[Tensor, "level batch"]
    """One row unless this step trains the ensemble; not yet matched to the backbone's table."""
    noise_seeds: list[int]
    """One per pair."""

    def shared(self, draw_of: Tensor) -> "StepDraws":
        """The same with pair i given the draws of pair `draw_of[i]`."""
        return StepDraws(
            sigma=self.sigma[:, draw_of], noise_seeds=[self.noise_seeds[pair] for pair in draw_of.tolist()]
        )


def draw_step(config: TrainConfig, step: int) -> StepDraws:
    """Noise levels and noise seeds of a step: a function of (config.seed, step) and of nothing else."""
    generator = torch.Generator().manual_seed(mix_seeds(config.seed, Stream.TRAINING_STEP, step))
    seeds = torch.randint(2**62, (config.batch_size,), generator=generator).tolist()
    seeds = [torch_seed(seed) for seed in seeds]
    num_levels = 1
    if torch.rand((), generator=generator).item() < config.ensemble_fraction:
        sizes = config.ensemble_sizes
        num_levels = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    noise = asdict(config.noise)
    distribution = noise.pop("distribution")
    sigma = sample_noise_levels(distribution, num_levels * config.batch_size, generator=generator, **noise)
    return StepDraws(sigma=sigma.reshape(num_levels, config.batch_size), noise_seeds=seeds)


class PairScorer(nn.Module):
    """Scores both sides of pairs in one forward: the module that is compiled and distributed.

    Everything that trains goes through `forward`, so a distributed wrapper sees every gradient.
    """

    def __init__(self, model: RewardModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        # Read by accelerate: the classes whose modules FSDP gathers and frees one by one.
        self._no_split_modules = sorted({type(module).__name__ for module in model.backbone.run_modules})
        self.gradient_checkpointing = gradient_checkpointing

    def tokens(self, batch: PairBatch, noise: Tensor, sigma: Float[Tensor, "level batch"]) -> HeadTokens:
        """Head tokens of every distinct latent at its pair's levels; rows are (level, latent)."""
        num_levels, num_pairs = sigma.shape
        backbone = self.model.backbone
        pair = batch.distinct % num_pairs  # one of the pairs that a latent is in: they share draw and prompt
        latents = torch.cat([batch.latents_chosen, batch.latents_rejected])[batch.distinct]
        latents = torch.cat([latents] * num_levels)
        sigmas = sigma[:, pair].reshape(-1)
        if self.model.config.add_noise:
            latents = backbone.schedule.add_noise(latents, torch.cat([noise[pair]] * num_levels), sigmas)
        conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds, batch.attention_mask)
        rows = conditioning.index_select(pair.repeat(num_levels))
        run = checkpointed if self.gradient_checkpointing and torch.is_grad_enabled() else call
        return self.model.tokens(backbone.features(latents, rows, sigmas, run=run))

    def scores(self, tokens: HeadTokens, num_levels: int, batch: PairBatch) -> tuple[Score, Score]:
        """Scores of (chosen, rejected) from the tokens of one or more levels."""
        score = self.model.score_tokens(tokens.unfold(num_levels))
        chosen, rejected = score.float()[batch.position].chunk(2)
        return chosen, rejected

    def forward(
        self, batch: PairBatch, noise: Tensor, sigma: Float[Tensor, "level batch"]
    ) -> tuple[Score, Score]:
        """Both sides of each pair get `noise` and `sigma` of the pair; sigma is matched already.

        Pairs of `batch` that share a draw must have been given equal noise and sigma.
        """
        chosen, rejected = self.scores(self.tokens(batch, noise, sigma), len(sigma), batch)
        return chosen.clone(), rejected.clone()  # FSDP2 warns of outputs that are views

    def margins(
        self, batch: PairBatch, noise: Tensor, candidates: Sequence[tuple[float, ...]]
    ) -> list[Float[Tensor, " batch"]]:
        """Margins of each candidate, one noise level or several that make a token-level ensemble.

        Every level goes through the backbone once; single levels and ensembles read the same tokens.

        Args:
            candidates: of levels that are in the backbone's table.
        """
        levels = sorted({level for candidate in candidates for level in candidate})
        rows = noise.new_ones(1, len(noise), dtype=torch.float32)
        tokens = {level: self.tokens(batch, noise, level * rows) for level in levels}
        margins: list[Tensor] = []
        for candidate in candidates:
            joined = HeadTokens.stack([tokens[level] for level in candidate])
            chosen, rejected = self.scores(joined, len(candidate), batch)
            margins.append(chosen - rejected)
        return margins


def loss_level(sigma: Float[Tensor, "level batch"]) -> NoiseLevel:
    """The level whose variance a score of several levels has: the smallest of them.

    >>> loss_level(torch.tensor([[0.6, 0.2], [0.8, 0.1]]))
    tensor([0.6000, 0.1000])
    """
    return sigma.amin(dim=0)
