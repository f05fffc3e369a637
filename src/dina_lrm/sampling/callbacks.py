"""Search inside a diffusers pipeline: callbacks that drop candidates, or move states along the gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_lrm.errors import InvalidInputError
from dina_lrm.models.reward_model import RewardModel
from dina_lrm.sampling.candidates import check_steps, gradient_step, score_predicted, to_drop

__all__ = ["Guide", "Pruner"]


class _Callback:
    """What both callbacks know: the prompt, and the state and level that a pipeline is at after a step."""

    def __init__(self, model: RewardModel, prompt: str) -> None:
        self.model = model
        self.conditioning = model.encode_prompts(prompt)

    def tensor_inputs(self, pipeline: Any) -> list[str]:
        """What to pass as `callback_on_step_end_tensor_inputs`: all that has a row per picture."""
        return list(pipeline._callback_tensor_inputs)

    def _next(self, pipeline: Any, step: int, latents: Tensor) -> tuple[Tensor, float, float] | None:
        """After `step`: timestep (batch,), noise level, and what the latents are divided by to be a mixture
        of clean latent and noise; None after the last step."""
        if latents.ndim != 4:
            raise InvalidInputError(
                f"{type(pipeline).__name__} packs its latents {tuple(latents.shape)}: use "
                f"dina_lrm.sampling.search with a Policy instead of a callback"
            )
        scheduler = pipeline.scheduler
        if step + 1 >= len(scheduler.timesteps):
            return None
        timestep = scheduler.timesteps[step + 1].float().to(latents.device).expand(len(latents))
        sigma = float(self.model.schedule.sigma_at(timestep[:1]))
        # Schedulers of the Euler kind hold z0 + sigma / sqrt(1 - sigma^2) eps, of variance above one.
        inflated = float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.0
        return timestep, sigma, (1 - sigma**2) ** -0.5 if inflated else 1.0


class Pruner(_Callback):
    """`callback_on_step_end` that drops candidates of one prompt, as `successive_halving` does.

    What a step predicted is read off the states before and after it, which is exact for first-order samplers
    without noise (flow-matching Euler, DDIM, Euler) and near for the others. The first comparison is after
    the second step at the earliest.

    Args:
        steps: of the pipeline's call.
        seed: of the noise that predicted clean latents are scored under.

    Attributes:
        kept: indices of the candidates that are still sampled.
    """

    def __init__(
        self,
        model: RewardModel,
        prompt: str,
        *,
        steps: int,
        confidence: float = 0.5,
        first_check: int | None = None,
        every: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        super().__init__(model, prompt)
        self.checks = check_steps(steps, first_check, every)
        self.confidence, self.seed, self.batch_size = confidence, seed, batch_size
        self.kept: list[int] = []
        self._before: tuple[Tensor, float] | None = None

    @torch.no_grad()
    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        latents = callback_kwargs["latents"]
        if step == 0:
            self.kept, self._before = list(range(len(latents))), None
        following = self._next(pipeline, step, latents)
        if following is None:
            return callback_kwargs
        _, sigma, scale = following
        state, before = latents.float() / scale, self._before
        self._before = state, sigma
        if step + 1 not in self.checks or len(latents) < 2 or before is None:
            return callback_kwargs
        scores = score_predicted(
            self.model, before[0], state, self.conditioning, (before[1], sigma), self.seed, self.batch_size
        )
        stay = ~to_drop(self.model, scores, sigma, self.confidence)
        self._before = state[stay], sigma
        self.kept = [index for index, good in zip(self.kept, stay.tolist(), strict=True) if good]
        return {name: _of_kept(name, value, stay, len(latents)) for name, value in callback_kwargs.items()}


def _of_kept(name: str, value: Any, stay: Tensor, count: int) -> Any:
    """Rows of a tensor that belong to kept candidates; guided pipelines hold two halves."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if len(value) % count:
        raise InvalidInputError(
            f"{name} has {len(value)} rows for {count} pictures: which to keep is not known"
        )
    return value[stay.repeat(len(value) // count).to(value.device)]


class Guide(_Callback):
    """`callback_on_step_end` that moves states along the reward's gradient, as `guided` does."""

    def __init__(
        self, model: RewardModel, prompt: str, *, strength: float = 0.05, window: Sequence[float] = (0.2, 0.9)
    ) -> None:
        super().__init__(model, prompt)
        self.strength, self.window = strength, tuple(window)

    def __call__(self, pipeline: Any, step: int, _: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        latents = callback_kwargs["latents"]
        following = self._next(pipeline, step, latents)
        if following is None or not self.window[0] <= following[1] <= self.window[1]:
            return callback_kwargs
        timestep, sigma, scale = following
        moved = gradient_step(self.model, latents / scale, self.conditioning, timestep, sigma, self.strength)
        return {**callback_kwargs, "latents": moved * scale}
