"""Scores of latents: backbone features, a head, and the adapter between them.

Departures from the paper's code. Nothing random stays hidden: noise comes from a seed per sample, so a score
is the same alone and in any batch. Nothing untrained scores: a fresh network refuses until it is told
otherwise. All levels of an ensemble, for all samples, share backbone calls.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dina_lrm.backbones.backbone import Backbone, BackboneFeatures, rows_for
from dina_lrm.backbones.lora import LoraAdapter
from dina_lrm.checkpoints.config import RewardModelConfig
from dina_lrm.checkpoints.contents import Checkpoint
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.ensemble import average_levels
from dina_lrm.core.noise import NoiseSchedule, seeded_noise
from dina_lrm.core.precision import without_inference_mode
from dina_lrm.core.sharding import full_tensor
from dina_lrm.core.tensors import Latents, Score, check_tensor
from dina_lrm.errors import InvalidInputError, UntrainedModelError
from dina_lrm.models.compiled import Regions
from dina_lrm.models.head import HeadTokens, LogisticSquash, RewardHead
from dina_lrm.models.scoring import (
    NoiseLevels,
    check_sigma,
    resolve_levels,
    resolve_seeds,
    whole_number,
)
from dina_lrm.pipelines.threads import Turn, in_turn
from dina_lrm.pipelines.weights import check_state

HALF = (torch.float16, torch.bfloat16)
PLAIN = Regions()

NetworkT = TypeVar("NetworkT", bound="RewardNetwork")


class RewardNetwork(nn.Module):
    """Scores latents for encoded prompts; `RewardModel` adds prompts, images, and checkpoints by name.

    Latents are unpacked `(batch, channel, height, width)`, already shifted and scaled; sigma is 0 for clean
    and 1 for pure noise.

    LoRA is merged into the base weights while no gradient for it can be wanted: in eval mode, and with grad
    mode off or the adapter frozen. It is unmerged otherwise. Merging and unmerging are exact.

    Threads may share a network: its public methods take turns. Calling the module itself, as training does,
    is for one thread. `score_latents` and `score_state` follow a `torch.autocast` of the caller: an alignment
    run chooses the precision of its rewards.

    Attributes:
        trained: False refuses to score (see `allow_untrained`); a trainer sets it.
        max_batch_size: latents in one backbone call, noise levels counted; more are done in turns.
        turn: held by the thread that uses the network.
        fingerprint: of the base weights as they were loaded (`backbones/fingerprint.py`).
        training_step: optimizer steps that these weights were trained for.
        card: what the model card adds about these weights, as `train` measured them or a checkpoint says.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: RewardHead,
        config: RewardModelConfig,
        *,
        adapter: LoraAdapter | None = None,
        trained: bool = False,
        allow_untrained: bool = False,
        max_batch_size: int = 64,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.turn = Turn()
        self.backbone = backbone
        self.head = head
        self.squash = LogisticSquash().to(head.query_tokens) if config.logistic else None
        self.config = config
        self.adapter = adapter
        self.trained = trained
        self.allow_untrained = allow_untrained
        self.max_batch_size = max_batch_size
        self.fingerprint = fingerprint
        self.training_step: int | None = None
        self.card: str | None = None
        self._merging = True
        self._compiled = Regions()
        self.register_load_state_dict_pre_hook(_unmerge_first)

    # ------------------------------------------------------------------------------------- scoring

    @in_turn
    def score_latents(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise_levels: NoiseLevels = None,
        noise: Tensor | None = None,
        seed: Any = None,
        *,
        num_draws: int | np.integer = 1,
        ensemble: Literal["tokens", "scores"] = "tokens",
        allow_untrained: bool | None = None,
    ) -> Score:
        """Scores of clean latents, (batch,); differentiable in them.

        Args:
            latents: (batch, channel, height, width), shifted and scaled, without noise.
            conditioning: one row per latent, or a single row for all.
            noise_levels: a number; a list of numbers for one ensemble over them; a tensor (batch,) for a
                level per sample or (level, batch) for an ensemble per sample. None: the checkpoint's default.
            noise: (batch, channel, height, width), used at every level; given, nothing is random.
            seed: of the noise otherwise; an int for all samples, or one per sample. None: fresh noise.
            num_draws: noise draws to average.
            ensemble: join token sequences of the levels in the head ("tokens"), or average their scores.
        """
        self._require_trained(allow_untrained)
        num_draws = whole_number(num_draws, "num_draws", 1)
        self.backbone.check_latents(latents)
        self.backbone.check_conditioning(conditioning)
        batch = latents.shape[0]
        rows = rows_for(len(conditioning), batch, latents.device).to(self.device)
        levels = resolve_levels(noise_levels, self.config.noise_levels, batch)
        if noise is None:
            draws = seeded_noise(latents.shape[1:], resolve_seeds(seed, batch), num_draws=num_draws)
        else:
            check_tensor(noise, "noise", latents.ndim, "the shape of the latents", finite=True)
            if noise.shape != latents.shape or num_draws != 1:
                raise InvalidInputError(
                    f"noise of shape {tuple(noise.shape)} for latents of shape {tuple(latents.shape)} and "
                    f"num_draws = {num_draws}: give one noise sample per latent and one draw"
                )
            draws = noise[None]
        scores = [
            self.score_checked(latents.to(self.device), conditioning, rows, levels, draw, ensemble)
            for draw in draws
        ]
        return torch.stack(scores).mean(dim=0)

    @in_turn
    def score_state(
        self,
        noisy_latents: Tensor,
        conditioning: Conditioning,
        timestep: Tensor,
        *,
        allow_untrained: bool | None = None,
    ) -> Score:
        """Scores of states a sampler is at, (batch,); differentiable in them.

        Args:
            noisy_latents: (batch, channel, height, width), as the sampler holds them; for variance-preserving
                samplers that scale their states, what the network is given.
            conditioning: one row per latent, or a single row for all.
            timestep: (batch,), the sampler's own: it is used as it is, not snapped to the training table.
        """
        self._require_trained(allow_untrained)
        self.backbone.check_latents(noisy_latents)
        self.backbone.check_conditioning(conditioning)
        batch = len(noisy_latents)
        if timestep.shape != (batch,):
            raise InvalidInputError(f"timestep has shape {tuple(timestep.shape)}: it must be ({batch},)")
        self._settle_adapter()
        rows = rows_for(len(conditioning), batch, noisy_latents.device)
        features = self.backbone.features_at(
            noisy_latents.to(self.device), conditioning.index_select(rows), timestep
        )
        return self.score_tokens(self.tokens(features))

    # ------------------------------------------------------------------------------------- the raw module

    @without_inference_mode()
    def forward(self, noisy_latents: Tensor, conditioning: Conditioning, sigma: Tensor) -> Score:
        """Scores of latents that are noisy already, as in training; (batch,).

        Args:
            sigma: (batch,), the level of each sample, snapped to the schedule's table for the timestep.
        """
        self._settle_adapter()
        batch = noisy_latents.shape[0] if isinstance(noisy_latents, Tensor) and noisy_latents.ndim else 0
        if not isinstance(sigma, Tensor) or sigma.shape != (batch,):
            shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else type(sigma).__name__
            raise InvalidInputError(f"sigma is {shape}: it must be a tensor ({batch},), one level per sample")
        check_sigma(sigma, "sigma")
        return self.score_tokens(self.tokens(self.backbone(noisy_latents, conditioning, sigma)))

    def tokens(self, features: BackboneFeatures) -> HeadTokens:
        """What the head reads of one noise level's features."""
        read = features.image, features.text, features.temb
        image, text = self._regions.method(self.head, "aggregate", *read)
        return HeadTokens(image, text, features.text_mask if text is not None else None)

    def noisy_tokens(
        self,
        latents: Latents,
        conditioning: Conditioning,
        levels: Float[Tensor, "level batch"],
        noise: Tensor,
    ) -> HeadTokens:
        """What the head reads of clean latents, each at several noise levels; rows ordered level by level.

        Args:
            conditioning: one row per latent.
            noise: one sample per latent, used at all of its levels.
        """
        self._settle_adapter()
        num_levels, batch = levels.shape
        matched = self.schedule.nearest(levels.flatten())
        latents = latents.to(
            torch.promote_types(latents.dtype, torch.float32)
        )  # mixing is never in half precision
        parts = []
        for start in range(0, num_levels * batch, self.max_batch_size):
            part = torch.arange(
                start, min(start + self.max_batch_size, num_levels * batch), device=self.device
            )
            sample = part % batch
            noisy = latents[sample]
            if self.config.add_noise:
                noisy = self.schedule.add_noise(noisy, noise[sample], matched.sigma[part])
            features = self.backbone.features_at(
                noisy,
                conditioning.index_select(sample),
                matched.timestep[part],
                run=self._regions.run,
            )
            parts.append(self.tokens(features))
        return HeadTokens.stack(parts)

    def score_tokens(self, tokens: HeadTokens) -> Score:
        """Scores from tokens, those of several noise levels unfolded into one row; (batch,)."""
        read = tokens.image, tokens.text, tokens.text_mask
        score = self._regions.method(self.head, "score_tokens", *read)
        return score if self.squash is None else self.squash(score)

    @in_turn
    def score_checked(
        self,
        latents: Latents,
        conditioning: Conditioning,
        rows: Tensor,
        levels: Float[Tensor, "level batch"],
        noise: Tensor,
        ensemble: str = "tokens",
    ) -> Score:
        """What `score_latents` computes, of inputs that have been checked already; (batch,).

        Args:
            rows: (batch,), which row of `conditioning` each latent is scored with.
            noise: one sample per latent, used at all of its levels.
        """
        if ensemble not in ("tokens", "scores"):
            raise InvalidInputError(f'ensemble = {ensemble!r}: it must be "tokens" or "scores"')
        if ensemble == "scores" and len(levels) > 1:
            each = [self.score_checked(latents, conditioning, rows, level[None], noise) for level in levels]
            return average_levels(torch.stack(each))
        levels, noise = levels.to(self.device), noise.to(self.device)
        step = max(1, self.max_batch_size // len(levels))
        chunks = [slice(start, start + step) for start in range(0, len(latents), step)]
        tokens = (
            self.noisy_tokens(latents[s], conditioning.index_select(rows[s]), levels[:, s], noise[s])
            for s in chunks
        )
        return torch.cat([self.score_tokens(joined.unfold(len(levels))) for joined in tokens])

    @in_turn
    def compile(self: NetworkT, backend: str = "inductor") -> NetworkT:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Score through `torch.compile` from now on, in eval mode: the same scores, up to rounding.

        Compiled are the blocks, once for each kind, and the head; the first score of a size waits for that.
        Training compiles by itself (`TrainConfig.compile`).
        """
        self._compiled = Regions(backend)
        return self

    @property
    def _regions(self) -> Regions:
        return PLAIN if self.training else self._compiled

    # ------------------------------------------------------------------------------------- weights

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def device(self) -> torch.device:
        return self.head.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone; head and adapter are at least float32."""
        return self.backbone.weight.dtype

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def num_parameters(self) -> dict[str, int]:
        """Parameter counts by part; works on the meta device too."""
        adapter = self.adapter.parameters() if self.adapter else []
        adapter_ids = {id(parameter) for parameter in adapter}
        with self._unmerged():
            base = [p for p in self.backbone.parts.parameters() if id(p) not in adapter_ids]
        parts = {
            "head": sum(p.numel() for p in self.head.parameters()),
            "lora": sum(p.numel() for p in adapter),
            "logistic": sum(p.numel() for p in self.squash.parameters()) if self.squash else 0,
            "backbone": sum(p.numel() for p in base),
        }
        return parts | {
            "trainable": sum(p.numel() for p in self.trainable_parameters()),
            "total": sum(parts.values()),
        }

    @in_turn
    def checkpoint(self, training_step: int | None = None) -> Checkpoint:
        """What `save_pretrained` writes, with whole tensors on the CPU.

        Where FSDP2 has cut the weights, every process must call this, and only the main one gets them.
        """
        with self._unmerged():
            return Checkpoint(
                config=self.config,
                head=_on_cpu(self.head.state_dict()),
                logistic=_on_cpu(self.squash.state_dict()) if self.squash else None,
                adapter=_on_cpu(self.adapter.state_dict()) if self.adapter else None,
                backbone=_on_cpu(self.backbone.state_dict()) if self.config.tuning == "full" else None,
                trained=self.trained,
                training_step=self.training_step if training_step is None else training_step,
                fingerprint=self.fingerprint,
                card=self.card,
            )

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Head, adapter and logistic out of a checkpoint; all of each, or an error."""
        check_state(self.head.state_dict(), checkpoint.head, f"the reward head in {checkpoint.origin}")
        self.head.load_state_dict(checkpoint.head)
        if self.squash is not None and checkpoint.logistic is not None:
            check_state(self.squash.state_dict(), checkpoint.logistic, f"the logistic in {checkpoint.origin}")
            self.squash.load_state_dict(checkpoint.logistic)
        if self.adapter is not None:
            assert checkpoint.adapter is not None
            self.adapter.load_state_dict(checkpoint.adapter, f"the LoRA adapter in {checkpoint.origin}")

    @in_turn
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in torch; base weights and adapter apart."""
        self._set_merged(False)
        return super().state_dict(*args, **kwargs)

    @in_turn
    def train(self: NetworkT, mode: bool = True) -> NetworkT:
        if mode:
            self._set_merged(False)
        return super().train(mode)

    @in_turn
    def to(self: NetworkT, *args: Any, **kwargs: Any) -> NetworkT:
        """As in torch, except that a half-precision dtype is for the backbone's base weights only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        if dtype not in HALF:
            return super().to(*args, **kwargs)
        self._set_merged(False)
        super().to(device=device, non_blocking=non_blocking)
        self.backbone.cast(dtype)
        return self

    def half(self: NetworkT) -> NetworkT:
        return self.to(torch.float16)

    def bfloat16(self: NetworkT) -> NetworkT:
        return self.to(torch.bfloat16)

    @in_turn
    def _apply(self: NetworkT, fn: Any, recurse: bool = True) -> NetworkT:
        self._set_merged(False)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------------------------- the adapter

    @in_turn
    def merge(self: NetworkT) -> NetworkT:
        """Let inference merge LoRA into the base weights (the default)."""
        self._merging = True
        return self

    @in_turn
    def unmerge(self: NetworkT) -> NetworkT:
        """Keep LoRA apart from the base weights, also in eval mode, until `merge` is called."""
        self._merging = False
        self._set_merged(False)
        return self

    def _settle_adapter(self) -> None:
        """Merge or unmerge LoRA, whichever the moment asks for."""
        if self.adapter is None or self.backbone.shared is not None or self.device.type == "meta":
            return
        gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.parameters())
        self._set_merged(self._merging and not self.training and not gradients)

    def _set_merged(self, merged: bool) -> None:
        if self.adapter is not None:
            self.adapter.merge() if merged else self.adapter.unmerge()

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        self._set_merged(False)
        yield  # the next score merges again

    # ------------------------------------------------------------------------------------- checks

    def _require_trained(self, allow_untrained: bool | None) -> None:
        if self.device.type == "meta":
            raise UntrainedModelError("this model is on the meta device: it has shapes but no weights")
        if self.device != self.backbone.weight.device:
            raise InvalidInputError(
                f"the head is on {self.device}, the backbone on {self.backbone.weight.device}: "
                f"a shared transformer moves with its pipeline, so move both"
            )
        allowed = self.allow_untrained if allow_untrained is None else allow_untrained
        if not self.trained and not allowed:
            raise UntrainedModelError(
                "this model has random weights, its scores would mean nothing: train it, or load one with "
                "from_pretrained; allow_untrained=True scores all the same"
            )


def _unmerge_first(model: RewardNetwork, *_: Any) -> None:
    """State dicts hold the base weights and the adapter apart, also those loaded into a module around it."""
    with model.turn:
        model._set_merged(False)


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor) for name, tensor in state.items()}
