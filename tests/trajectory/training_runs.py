"""Thirty steps on a tiny random backbone, and what is read off a run."""

from dataclasses import replace

import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.data.latents import LatentPairs
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.runs.config import OptimizerConfig
from dina_lrm.training.config import TrainConfig, ValidationConfig
from dina_lrm.training.result import TrainResult
from tests.tiny import preferred_pairs

TEXT_TOKENS = 6

CONFIG = TrainConfig(
    seed=0,
    num_steps=30,
    batch_size=8,
    log_every=5,
    checkpoint_every=1000,
    tensorboard=False,
    cpu=True,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, ema_decay=0.9),
    validation=ValidationConfig(every=10, noise_levels=(0.2, 0.6), ensembles=((0.2, 0.6),), max_pairs=16),
)


def make_pairs(num_pairs: int, seed: int) -> LatentPairs:
    """Of two random latents, the one with the higher mean in its first channel is preferred."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2 * num_pairs, 16, 4, 4, generator=generator)
    latents[:, 0] += torch.randn(2 * num_pairs, generator=generator)[:, None, None]
    num_prompts = 8
    embeds = torch.randn(num_prompts, TEXT_TOKENS, 64, generator=generator)
    pooled = torch.randn(num_prompts, 64, generator=generator)
    return replace(preferred_pairs(latents, Conditioning(embeds, pooled)), bayes=torch.ones(num_pairs))


def trained_values(model: RewardModel) -> dict[str, Tensor]:
    model.train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def losses(result: TrainResult) -> list[float]:
    return [metrics.loss for metrics in result.history if metrics.loss is not None]


def margins(model: RewardModel, pairs: LatentPairs, levels: list[float]) -> Tensor:
    batch = pairs.batch(range(len(pairs)))
    conditioning = Conditioning(batch.prompt_embeds, batch.pooled_prompt_embeds)
    noise = torch.randn(batch.latents_chosen.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen, rejected = (
            model.score_latents(latents, conditioning, noise_levels=levels, noise=noise)
            for latents in (batch.latents_chosen, batch.latents_rejected)
        )
    return chosen - rejected
