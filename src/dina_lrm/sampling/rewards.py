"""What a policy is told about its pictures: latent rewards, here or of a server, and sums of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.noise import torch_seed
from dina_lrm.core.tensors import Latents, Score
from dina_lrm.errors import InvalidInputError, RunError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.remote.client import Client

__all__ = ["LatentReward", "Reward", "RewardError", "RewardSum", "ServerReward", "checked"]

Reward = Callable[[Latents, Sequence[str], Sequence[int]], Score]
"""Scores (batch,) of clean latents for prompts, with the seeds of whatever is random in it; differentiable
in the latents where it is used by refl. A reward on pixels decodes first (`Policy.decode`)."""


class RewardError(RunError):
    """A reward that is not a number: nothing can be learned from it."""


@dataclass(frozen=True)
class LatentReward:
    """A `RewardModel` on clean latents; the noise of sample i follows from seed i.

    Args:
        noise_levels: empty for the model's own.
    """

    model: RewardModel
    noise_levels: tuple[float, ...] = ()

    def __call__(self, latents: Latents, prompts: Sequence[str], seeds: Sequence[int]) -> Score:
        levels = list(self.noise_levels) or None
        return self.model.score_latents(
            latents, self._encode(prompts), levels, seed=[*map(torch_seed, seeds)]
        )

    def of_state(self, noisy_latents: Latents, prompts: Sequence[str], timestep: Tensor) -> Score:
        """Scores of states that a sampler is at."""
        return self.model.score_state(noisy_latents, self._encode(prompts), timestep)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """Each new prompt alone, as `Policy.encode` does."""
        for prompt in dict.fromkeys(prompts):
            self.model.encode_prompts([prompt])
        return self.model.encode_prompts(prompts)


@dataclass(frozen=True)
class ServerReward:
    """A server's scores of clean latents; the noise of sample i follows from seed i.

    The server is sent the policy's own embeddings of the prompts. Scores have no gradient, and noisy states
    have no score.

    Args:
        encode: `Policy.encode`.
        noise_level: one, in [0, 1]; the protocol has no ensembles.
    """

    client: Client
    encode: Callable[[Sequence[str]], Conditioning]
    noise_level: float = 0.4

    def __call__(self, latents: Latents, prompts: Sequence[str], seeds: Sequence[int]) -> Score:
        """See `Reward`.

        Raises:
            InvalidInputError: a gradient is wanted, or the server refuses.
            ScoringError: no score after all attempts.
        """
        if torch.is_grad_enabled() and latents.requires_grad:
            raise InvalidInputError(f"{self.client.url} is a server, whose scores have no gradient")
        own = [torch_seed(seed) for seed in seeds]
        return self.client.score_latents(latents.float(), self.encode(prompts), self.noise_level, own)


@dataclass(frozen=True)
class RewardSum:
    """w_1 r_1 + w_2 r_2 + ..."""

    terms: tuple[Reward, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.terms) != len(self.weights) or not self.terms:
            raise InvalidInputError(f"{len(self.weights)} weights for {len(self.terms)} rewards")

    def __call__(self, latents: Latents, prompts: Sequence[str], seeds: Sequence[int]) -> Score:
        found = [w * term(latents, prompts, seeds) for w, term in zip(self.weights, self.terms, strict=True)]
        return torch.stack(found).sum(dim=0)

    def of_state(self, noisy_latents: Latents, prompts: Sequence[str], timestep: Tensor) -> Score:
        """Scores of noisy states; all terms must be latent rewards.

        Raises:
            InvalidInputError: a term sees clean pictures only.
        """
        found: list[Tensor] = []
        for weight, term in zip(self.weights, self.terms, strict=True):
            if not isinstance(term, LatentReward | RewardSum):
                raise InvalidInputError(
                    f"{type(term).__name__} cannot score noisy states: use a latent reward"
                )
            found.append(weight * term.of_state(noisy_latents, prompts, timestep))
        return torch.stack(found).sum(dim=0)


def checked(scores: Score, prompts: Sequence[str]) -> Score:
    """The same scores, all finite.

    Raises:
        RewardError: some are not; it names the first prompt.
    """
    if scores.shape != (len(prompts),):
        raise RewardError(f"the reward gave {tuple(scores.shape)} scores for {len(prompts)} pictures")
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise RewardError(
            f"the reward of {int(bad.sum())} of {len(prompts)} pictures is not finite, "
            f"first {scores[first].item()} for prompt {prompts[first]!r}"
        )
    return scores
