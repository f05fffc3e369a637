"""The reward model: backbone features of noisy latents, a head, and the ways to ask it for a score.

Departures from the paper's code. Nothing random stays hidden: noise comes from a seed per sample, so a score
is the same alone and in any batch. Nothing untrained scores: a missing or misfitting file is an error, and a
fresh model refuses until it is told otherwise. All levels of an ensemble, for all samples, share backbone
calls, and a prompt's text projection is computed once.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dina_lrm.backbones.backbone import Backbone, BackboneFeatures, Conditioning, check_tensor, rows_for
from dina_lrm.backbones.lora import LoraAdapter
from dina_lrm.backbones.prompts import check_prompts, prompt_list
from dina_lrm.checkpoints.config import HeadConfig, LikelihoodConfig, RewardModelConfig, Tuning
from dina_lrm.checkpoints.dina import OWNED, Checkpoint, read_checkpoint, write_checkpoint
from dina_lrm.core.attention import without_autocast, without_inference_mode
from dina_lrm.core.ensemble import average_levels, mean_and_standard_error
from dina_lrm.core.noise import NoiseSchedule, seeded_generator, seeded_noise
from dina_lrm.core.sharding import whole
from dina_lrm.core.tensors import Latents, Score
from dina_lrm.errors import InvalidInputError, MissingComponentError, UntrainedModelError
from dina_lrm.models import loading
from dina_lrm.models.adaptive import AdaptiveComparison, compare_adaptively, rank_adaptively, score_to_target
from dina_lrm.models.encoders import Encoders
from dina_lrm.models.head import HeadTokens, LogisticSquash, RewardHead
from dina_lrm.models.images import image_list
from dina_lrm.models.placement import resolve_device, resolve_dtype
from dina_lrm.models.scoring import (
    NoiseLevels,
    RankedImage,
    ScoreOutput,
    check_sigma,
    preference_probability,
    resolve_levels,
    resolve_seeds,
    whole_number,
)
from dina_lrm.models.watch import RewardWatch
from dina_lrm.pipelines import hub
from dina_lrm.pipelines.threads import Turn, in_turn, library_lock
from dina_lrm.pipelines.weights import check_state

HALF = (torch.float16, torch.bfloat16)


class RewardModel(nn.Module):
    """Scores how well people would like a picture for a prompt, from its noisy latents.

    Make one with `from_pretrained` (to score) or `initialize` (to train). Latents are unpacked
    `(batch, channel, height, width)`, already shifted and scaled; sigma is 0 for clean and 1 for pure noise.

    LoRA is merged into the base weights while no gradient for it can be wanted: in eval mode, and with grad
    mode off or the adapter frozen. It is unmerged otherwise. Merging and unmerging are exact.

    Threads may share a model: its public methods take turns. Calling the module itself, as training does, is
    for one thread. `score`, `compare` and `rank` compute outside any `torch.autocast` of the caller;
    `score_latents` and `score_state` follow it: an alignment run chooses the precision of its rewards.

    Attributes:
        trained: False refuses to score (see `allow_untrained`); a trainer sets it.
        max_batch_size: latents in one backbone call, noise levels counted; more are done in turns.
        turn: held by the thread that uses the model.
        fingerprint: of the base weights as they were loaded (`backbones/fingerprint.py`).
    """

    def __init__(
        self,
        backbone: Backbone,
        head: RewardHead,
        config: RewardModelConfig,
        *,
        adapter: LoraAdapter | None = None,
        encoders: Encoders | None = None,
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
        self.encoders = encoders
        self.trained = trained
        self.allow_untrained = allow_untrained
        self.max_batch_size = max_batch_size
        self.fingerprint = fingerprint
        self.training_step: int | None = None
        self.card: str | None = None
        """What the model card adds about these weights, as `train` measured them or a checkpoint says."""
        self._merging = True
        self._attached_to: Any = None
        self.register_load_state_dict_pre_hook(_unmerge_first)

    # ------------------------------------------------------------------------------------- making one

    @classmethod
    @without_inference_mode()
    def from_pretrained(
        cls,
        reward: str | Path,
        pipeline: Any = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
    ) -> "RewardModel":
        """Load a trained reward, ready to score.

        Args:
            reward: "bundled", a folder or a hub id; published layout or ours.
            pipeline: where the base weights and encoders come from: a folder, a hub id, or a diffusers
                pipeline, whose transformer is never changed: a frozen backbone shares its weights, any other
                copies the kept blocks (`attach` shares those too). None: the one named in the checkpoint.
            device: CPU unless given (for a live pipeline: its own).
            dtype: of the backbone and text encoders, or its name, such as "bfloat16"; float32 unless given
                (for a live pipeline: its own). Head and LoRA are float32 at least.
            variant: of the pipeline's weight files, such as "fp16". revision: of a reward on the hub.

        Raises:
            CheckpointError: there is no reward there, or a damaged one, or one for another backbone.
            MissingComponentError: the pipeline is not there, or lacks a part.
            InvalidInputError: no such device or dtype.
        """
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        checkpoint = read_checkpoint(reward, revision)
        pipeline = checkpoint.config.backbone_id if pipeline is None else pipeline
        if pipeline is None:
            raise MissingComponentError(f"the checkpoint {reward} names no backbone: pass pipeline=...")
        with library_lock:
            parts = loading.load(
                checkpoint.config, pipeline, checkpoint, device=device, dtype=dtype, variant=variant
            )
            model = cls(**parts, trained=checkpoint.trained)
            model.training_step, model.card = checkpoint.training_step, checkpoint.card
            model._load(checkpoint)
            return model.eval()

    @classmethod
    @without_inference_mode()
    def initialize(
        cls,
        pipeline: Any,
        *,
        num_blocks: int | None = None,
        image_taps: Sequence[int] | None = None,
        text_taps: Sequence[int] | None = None,
        lora_rank: int = 0,
        lora_alpha: float | int | None = None,
        tuning: Tuning | None = None,
        head: HeadConfig | None = None,
        logistic: bool = False,
        likelihood: LikelihoodConfig | None = None,
        noise_levels: Sequence[float | int] = (0.4,),
        guidance: float | None = None,
        max_text_tokens: int | None = None,
        seed: int = 0,
        allow_untrained: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
    ) -> "RewardModel":
        """A new reward model to be trained, in training mode.

        Args:
            pipeline: as in `from_pretrained`; with device="meta" also an `Architecture`, to count or plan.
            num_blocks: blocks kept. Unless given half of the transformer, FLUX's double blocks, or a UNet's
                down and mid blocks.
            image_taps, text_taps: thirds of the kept blocks unless given; where blocks leave the text as it
                is (UNet, Wan), text is read at 0.
            lora_rank: 0 freezes the backbone, or trains all of it with tuning="full". lora_alpha: twice the
                rank unless given.
            guidance: what a guidance-distilled transformer (FLUX.1 [dev]) is told; 3.5 unless given.
            seed: of the head's and adapter's first weights.
            allow_untrained: let it score with random weights.
        """
        device, dtype = resolve_device(device), resolve_dtype(dtype)
        (seed,) = resolve_seeds(seed, 1)
        config = loading.new_config(
            pipeline,
            num_blocks=num_blocks,
            image_taps=image_taps,
            text_taps=text_taps,
            tuning=tuning or ("lora" if lora_rank else "frozen"),
            lora_rank=lora_rank,
            lora_alpha=2.0 * lora_rank if lora_alpha is None else float(lora_alpha),
            head=head or HeadConfig(),
            logistic=logistic,
            likelihood=likelihood or LikelihoodConfig(),
            noise_levels=tuple(float(level) for level in noise_levels),
            guidance=guidance,
            max_text_tokens=max_text_tokens,
        )
        if config.tuning == "full" and dtype in HALF:
            raise InvalidInputError(
                f"tuning = 'full' keeps float32 master weights, not {dtype}: train under autocast"
            )
        with library_lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_rng_state(seeded_generator(seed).get_state())  # which reads more than 32 bits
            parts = loading.load(config, pipeline, None, device=device, dtype=dtype, variant=variant)
            return cls(**parts, allow_untrained=allow_untrained).train()

    @in_turn
    def attach(self, pipeline: Any) -> "RewardModel":
        """Share the base weights of a live pipeline's transformer instead of holding our own.

        For alignment, where policy and reward have the same base. Nothing but the values of the weights is
        shared: the reward's LoRA lies on modules of its own, the pipeline's adapters, hooks and modes never
        reach the reward, and the two may be used at the same time. The reward is frozen from here on and
        follows the pipeline when that is moved or cast; move the head along with `to`. `detach` undoes it.

        Raises:
            InvalidInputError: the pipeline is not live, of another architecture, has other base weights (a
                fused LoRA makes them others), or does not hold them in place (offloading). Scoring raises the
                same when base weights change afterwards: a policy that trains them needs a reward of its own.
        """
        self._set_merged(False)
        with library_lock:
            self.backbone, self.adapter = loading.attach(self, pipeline)
        self._attached_to = pipeline
        self.head.to(device=self.backbone.weight.device)
        if self.squash is not None:
            self.squash.to(device=self.backbone.weight.device)
        self.encoders = loading.live_encoders(self, pipeline) or self.encoders
        return self.requires_grad_(False).eval()

    def watch(self, pipeline: Any) -> RewardWatch:
        """A `callback_on_step_end` scoring the states a live pipeline samples through (`models/watch.py`).

        Raises:
            InvalidInputError: the pipeline is not live, or its network is not the reward's kind of backbone.
        """
        self._require_trained(None)
        loading.check_same_architecture(self, pipeline)
        return RewardWatch(self, pipeline)

    @property
    def attached(self) -> bool:
        """Are the base weights those of a live pipeline's transformer?"""
        return self._attached_to is not None

    @in_turn
    def detach(self) -> "RewardModel":
        """Go on with a copy of the attached pipeline's base weights."""
        if self._attached_to is not None:
            with library_lock:
                self.backbone, self.adapter = loading.detach(self, self._attached_to)
            self._attached_to = None
        return self

    # ------------------------------------------------------------------------------------- scoring

    @in_turn
    @torch.no_grad()
    def score(
        self,
        prompts: str | Sequence[str],
        images: Any,
        noise_levels: NoiseLevels = None,
        seed: Any = 0,
        *,
        num_draws: int | np.integer = 1,
        ensemble: Literal["tokens", "scores"] = "tokens",
        target_error: float | None = None,
        max_draws: int = 64,
        allow_untrained: bool | None = None,
    ) -> ScoreOutput:
        """Scores of pictures for prompts, pair by pair; one prompt or one picture serves all of the other.

        Args:
            images: one or a list of paths, bytes, open binary files, PIL images, arrays (height, width,
                channel) or tensors (channel, height, width), uint8 or floating in [0, 1]; sizes may differ.
            noise_levels: see `score_latents`.
            seed: of the noise; an int for all, or one per picture.
            num_draws: noise draws to average; more than one also gives standard errors.
            target_error: draw as often as each picture needs for this standard error, instead of `num_draws`
                times; see `core.adaptive.stein_draws` for what is guaranteed.
            max_draws: most draws of a picture; read only with target_error.

        Raises:
            InvalidInputError: a prompt, picture, level, seed or number that cannot be used; it says which.
            MissingComponentError: the pipeline lacks a text encoder or the VAE.
        """
        self._require_trained(allow_untrained)
        num_draws = whole_number(num_draws, "num_draws", 1)
        if target_error is not None and not (target_error > 0 and max_draws >= 2):
            raise InvalidInputError(
                f"target_error = {target_error} with max_draws = {max_draws}: need more than 0 and at least 2"
            )
        prompts, pictures = prompt_list(prompts), image_list(images)
        batch = max(len(prompts), len(pictures))
        if len(prompts) not in (1, batch) or len(pictures) not in (1, batch):
            raise InvalidInputError(
                f"{len(prompts)} prompts for {len(pictures)} images: give pairs, or one of either"
            )
        seeds = resolve_seeds(seed, batch)
        levels = resolve_levels(noise_levels, self.config.noise_levels, batch)
        unique = list(dict.fromkeys(prompts))
        conditioning = self.encode_prompts(unique)
        prompt_rows = [unique.index(prompt) for prompt in prompts] * (batch // len(prompts))
        latents = self._need_encoders("images", "vae").encode_images(pictures, self.device)
        latents = latents * (batch // len(latents))

        def draws(pictures: Sequence[int], start: int, stop: int) -> Tensor:
            """Scores (draw, picture) of noise draws start to stop - 1."""
            found = torch.empty(stop - start, batch, dtype=self.head.dtype, device=self.device)
            for rows in _equal_shapes(latents, pictures):
                stacked = torch.stack([latents[row] for row in rows])
                self.backbone.check_latents(stacked)
                noise = seeded_noise(stacked.shape[1:], [seeds[row] for row in rows], num_draws=stop)
                which = torch.tensor([prompt_rows[row] for row in rows], device=self.device)
                with without_autocast(self.device.type):
                    for draw in range(start, stop):
                        found[draw - start, rows] = self._score(
                            stacked, conditioning, which, levels[:, rows], noise[draw], ensemble
                        )
            return found[:, list(pictures)]

        everyone = range(batch)
        if target_error is None:
            return ScoreOutput(*mean_and_standard_error(draws(everyone, 0, num_draws)))
        return score_to_target(draws, batch, target_error, max_draws)

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
            self._score(latents.to(self.device), conditioning, rows, levels, draw, ensemble) for draw in draws
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

    @in_turn
    def compare(
        self,
        prompt: str,
        image_a: Any,
        image_b: Any,
        noise_levels: NoiseLevels = None,
        seed: Any = 0,
        *,
        num_draws: int | np.integer = 1,
        adaptive: bool = False,
    ) -> float:
        """Probability that `image_a` is preferred to `image_b`, both seen through the same noise.

        Args:
            adaptive: look at one noise level after another and stop when it is settled which side leads
                (`config.adaptive`); noise_levels and num_draws are not used then.
        """
        if adaptive:
            return self.compare_views(prompt, image_a, image_b, seed).probability
        check_prompts([prompt])
        (seed,) = resolve_seeds(seed, 1)
        pictures = _two_images(image_a, image_b)
        score_a, score_b = self.score(
            prompt, pictures, noise_levels, seed, num_draws=num_draws
        ).scores.tolist()
        levels = resolve_levels(noise_levels, self.config.noise_levels, 2)[:, 0].double()
        wanted = [round(level, 6) for level in levels.tolist()]
        return preference_probability(score_a - score_b, wanted, self.config)

    @in_turn
    @torch.no_grad()
    def compare_views(self, prompt: str, image_a: Any, image_b: Any, seed: Any = 0) -> AdaptiveComparison:
        """An adaptive `compare` that also says how many views it took.

        Raises:
            InvalidInputError: the reward has not learned views.
        """
        self._require_trained(None)
        check_prompts([prompt])
        (seed,) = resolve_seeds(seed, 1)
        pictures = _two_images(image_a, image_b)
        latents = self._need_encoders("images", "vae").encode_images(pictures, self.device)
        return compare_adaptively(self, prompt, latents, seed)

    @in_turn
    @torch.no_grad()
    def rank(
        self,
        prompt: str,
        images: Any,
        noise_levels: NoiseLevels = None,
        seed: Any = 0,
        *,
        num_draws: int | np.integer = 1,
        adaptive: bool = False,
    ) -> list[RankedImage]:
        """Pictures from best to worst, with scores, all seen through the same noise.

        Args:
            adaptive: as in `compare`: pictures are viewed until each is settled against its neighbours.
                Scores are then in probits: P(a preferred to b) = Phi(score_a - score_b).
        """
        check_prompts([prompt])
        (seed,) = resolve_seeds(seed, 1)
        listed = image_list(images)
        if adaptive:
            self._require_trained(None)
            latents = self._need_encoders("images", "vae").encode_images(listed, self.device)
            return rank_adaptively(self, prompt, listed, latents, seed)
        scores = self.score(prompt, listed, noise_levels, seed, num_draws=num_draws).scores.tolist()
        ranked = [
            RankedImage(index, image, score)
            for index, (image, score) in enumerate(zip(listed, scores, strict=True))
        ]
        return sorted(ranked, key=lambda item: -item.score)

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
        image, text = self.head.aggregate(features.image, features.text, features.temb)
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
        sigma = self.schedule.match(levels.flatten()).sigma
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
                noisy = self.schedule.add_noise(noisy, noise[sample], sigma[part])
            features = self.backbone.features(noisy, conditioning.index_select(sample), sigma[part])
            parts.append(self.tokens(features))
        return HeadTokens.stack(parts)

    def score_tokens(self, tokens: HeadTokens) -> Score:
        """Scores from tokens, those of several noise levels unfolded into one row; (batch,)."""
        score = self.head.score_tokens(tokens.image, tokens.text, tokens.text_mask)
        return score if self.squash is None else self.squash(score)

    @in_turn
    def encode_prompts(self, prompts: str | Sequence[str]) -> Conditioning:
        """Conditioning with one row per prompt, from the pipeline's own text encoders; cached per prompt."""
        encoders = self._need_encoders("prompts", "text_encoder")
        return encoders.encode_prompts(prompt_list(prompts), self.device)

    @in_turn
    def prompt_notes(self, prompt: str) -> list[str]:
        """What the text encoders will not see of a prompt; `encode_prompts` warns of the same."""
        return self._need_encoders("prompts", "text_encoder").text.notes(prompt, self.device)

    def picture_size(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Height and width in pixels at which a picture of a given size is encoded.

        Raises:
            InvalidInputError: the picture is too small; `name` says which.
        """
        return self._need_encoders("images", "vae").picture_size(height, width, name)

    @in_turn
    def encode_images(self, images: Any, *, sample: bool = False, seed: Any = None) -> Latents:
        """Clean latents of pictures of one size, shifted and scaled: the VAE's mean, or a sample."""
        pictures = image_list(images)
        seeds = resolve_seeds(seed, len(pictures)) if sample else None
        latents = self._need_encoders("images", "vae").encode_images(pictures, self.device, seeds=seeds)
        if len({latent.shape for latent in latents}) > 1:
            sizes = sorted({"x".join(map(str, latent.shape[:0:-1])) for latent in latents})
            raise InvalidInputError(
                f"pictures give latents of different sizes ({', '.join(sizes)}): encode them size by size"
            )
        return torch.stack(latents)

    @in_turn
    def decode_latents(self, latents: Tensor) -> Float[Tensor, "batch 3 *frame height width"]:
        """Pictures in [0, 1] of clean latents, by the pipeline's VAE: the way back from `encode_images`."""
        self.backbone.check_latents(latents)
        return self._need_encoders("latents", "vae").decode_latents(latents, self.device)

    def check_inputs(
        self, latents: Tensor, conditioning: Conditioning, latent_space: str | None = None
    ) -> None:
        """InvalidInputError unless latents and conditioning suit the backbone.

        Args:
            latent_space: VAE that the latents come from, where it is known; see `latent_space`.
        """
        self.backbone.check_latents(latents)
        self.backbone.check_conditioning(conditioning)
        own = self.latent_space
        if latent_space is not None and own is not None and latent_space != own:
            raise InvalidInputError(
                f"these latents are of another family: they come from {latent_space}, "
                f"the reward's pipeline has {own}"
            )

    # ------------------------------------------------------------------------------------- state

    @property
    def latent_space(self) -> str | None:
        """Class and normalisation of the pipeline's VAE; None if it has none."""
        return None if self.encoders is None else self.encoders.latent_space

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def device(self) -> torch.device:
        return self.head.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone; head and adapter are at least float32."""
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

    def save_pretrained(
        self,
        folder: str | Path,
        layout: str = "dina",
        *,
        training_step: int | None = None,
        model_card: str | None = None,
    ) -> Path:
        """Write a checkpoint atomically.

        Args:
            layout: ours, or "published", which the paper's own code can read.
            model_card: Markdown to add to README.md: data, recipe, measured figures; None: `card`, what
                these weights were trained or loaded with.
        """
        checkpoint = self.checkpoint(training_step)
        if model_card is not None:
            checkpoint = replace(checkpoint, card=model_card)
        write_checkpoint(Path(folder), checkpoint, layout)
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        layout: str = "dina",
    ) -> str:
        """Upload what `save_pretrained` writes, as one commit; `from_pretrained(repo_id)` loads it anywhere.

        Args:
            repo_id: owner/name; the repository is made if there is none. Files of an earlier checkpoint that
                this one does not have are deleted from it, others stay.
            private: of a new repository; None: the owner's default.
            token: with write access; None: the one of `hf auth login` or HF_TOKEN.
            commit_message: "DiNa-LRM reward" unless given.
            layout: as in `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            InvalidInputError: a repo_id that is no owner/name, or an unknown layout.
            HubError: no token, one that may not write there, or no network.
        """
        with tempfile.TemporaryDirectory() as parent:
            return hub.upload(
                self.save_pretrained(Path(parent) / "reward", layout),
                repo_id,
                private=private,
                token=token,
                message=commit_message or "DiNa-LRM reward",
                replaced=[pattern for name in OWNED for pattern in (name, f"{name}/*")],
            )

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

    @in_turn
    def merge(self) -> "RewardModel":
        """Let inference merge LoRA into the base weights (the default)."""
        self._merging = True
        return self

    @in_turn
    def unmerge(self) -> "RewardModel":
        """Keep LoRA apart from the base weights, also in eval mode, until `merge` is called."""
        self._merging = False
        self._set_merged(False)
        return self

    @in_turn
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in torch; base weights and adapter apart."""
        self._set_merged(False)
        return super().state_dict(*args, **kwargs)

    @in_turn
    def train(self, mode: bool = True) -> "RewardModel":
        if mode:
            self._set_merged(False)
        return super().train(mode)

    @in_turn
    def to(self, *args: Any, **kwargs: Any) -> "RewardModel":
        """As in torch, except that a half-precision dtype is for the backbone's base weights only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        if dtype not in HALF:
            return super().to(*args, **kwargs)
        self._set_merged(False)
        super().to(device=device, non_blocking=non_blocking)
        self.backbone.cast(dtype)
        return self

    def half(self) -> "RewardModel":
        return self.to(torch.float16)

    def bfloat16(self) -> "RewardModel":
        return self.to(torch.bfloat16)

    @in_turn
    def _apply(self, fn: Any, recurse: bool = True) -> "RewardModel":
        self._set_merged(False)
        return super()._apply(fn, recurse)

    # ------------------------------------------------------------------------------------- inside

    def _score(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        rows: Tensor,
        levels: Tensor,
        noise: Tensor,
        ensemble: str,
    ) -> Score:
        """Scores of (batch) latents at (level, batch) noise levels; `rows` says which prompt each reads."""
        if ensemble not in ("tokens", "scores"):
            raise InvalidInputError(f'ensemble = {ensemble!r}: it must be "tokens" or "scores"')
        if ensemble == "scores" and len(levels) > 1:
            each = [
                self._score(latents, conditioning, rows, level[None], noise, "tokens") for level in levels
            ]
            return average_levels(torch.stack(each))
        levels, noise = levels.to(self.device), noise.to(self.device)
        step = max(1, self.max_batch_size // len(levels))
        chunks = [slice(start, start + step) for start in range(0, len(latents), step)]
        tokens = (
            self.noisy_tokens(latents[s], conditioning.index_select(rows[s]), levels[:, s], noise[s])
            for s in chunks
        )
        return torch.cat([self.score_tokens(joined.unfold(len(levels))) for joined in tokens])

    def _need_encoders(self, what: str, component: str) -> Encoders:
        if self.encoders is None:
            raise MissingComponentError(
                f"the pipeline has only a transformer and a scheduler, no {component}, so {what} cannot be "
                f"encoded: give a complete pipeline, or use score_latents"
            )
        return self.encoders

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

    def _load(self, checkpoint: Checkpoint) -> None:
        """Head, adapter and logistic out of a checkpoint; all of each, or an error."""
        check_state(self.head.state_dict(), checkpoint.head, f"the reward head in {checkpoint.origin}")
        self.head.load_state_dict(checkpoint.head)
        if self.squash is not None and checkpoint.logistic is not None:
            check_state(self.squash.state_dict(), checkpoint.logistic, f"the logistic in {checkpoint.origin}")
            self.squash.load_state_dict(checkpoint.logistic)
        if self.adapter is not None:
            assert checkpoint.adapter is not None
            self.adapter.load_state_dict(checkpoint.adapter, f"the LoRA adapter in {checkpoint.origin}")


def _unmerge_first(model: RewardModel, *_: Any) -> None:
    """State dicts hold the base weights and the adapter apart, also those loaded into a module around it."""
    with model.turn:
        model._set_merged(False)


def _two_images(image_a: Any, image_b: Any) -> list[Any]:
    images = [*image_list(image_a), *image_list(image_b)]
    if len(images) != 2:
        raise InvalidInputError(f"compare takes two images, not {len(images)}")
    return images


def _equal_shapes(latents: Sequence[Tensor], rows: Sequence[int]) -> list[list[int]]:
    """These rows, those of latents of one shape together."""
    groups: dict[torch.Size, list[int]] = {}
    for row in rows:
        groups.setdefault(latents[row].shape, []).append(row)
    return list(groups.values())


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in state.items()}
