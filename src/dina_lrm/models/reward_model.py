"""The reward model: scores, comparisons and ranks of images; loading, sharing and saving."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dina_lrm.backbones.prompts import check_prompts, prompt_list
from dina_lrm.checkpoints.config import HeadConfig, LikelihoodConfig, Tuning
from dina_lrm.checkpoints.dina import OWNED, read_checkpoint, write_checkpoint
from dina_lrm.core.ensemble import mean_and_standard_error
from dina_lrm.core.noise import seeded_generator, seeded_noise
from dina_lrm.core.precision import without_autocast, without_inference_mode
from dina_lrm.core.seeds import mix_seeds, text_seed
from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.images import image_list
from dina_lrm.models import loading
from dina_lrm.models.adaptive import AdaptiveComparison, compare_adaptively, rank_adaptively, score_to_target
from dina_lrm.models.encoded_reward import EncodedReward
from dina_lrm.models.placement import resolve_device, resolve_dtype
from dina_lrm.models.scoring import (
    NoiseLevels,
    RankedImage,
    ScoreOutput,
    preference_probability,
    resolve_levels,
    resolve_seeds,
    whole_number,
)
from dina_lrm.models.watch import RewardWatch
from dina_lrm.pipelines import hub
from dina_lrm.pipelines.threads import in_turn, library_lock

HALF = (torch.float16, torch.bfloat16)


class RewardModel(EncodedReward):
    """Scores how well people would like a picture for a prompt, from its noisy latents.

    Make one with `from_pretrained` (to score) or `initialize` (to train). Threads may share a model: its
    public methods take turns. `score`, `compare` and `rank` compute outside any `torch.autocast` of the
    caller.

    Args: those of `EncodedReward`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._attached_to: Any = None

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
        compile: bool = False,
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
            compile: score through `torch.compile`, see `RewardNetwork.compile`.

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
            model.load_checkpoint(checkpoint)
            return model.compile().eval() if compile else model.eval()

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
        if self.attached:
            raise InvalidInputError("this reward already shares a pipeline's transformer: detach it first")
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
                        found[draw - start, rows] = self.score_checked(
                            stacked, conditioning, which, levels[:, rows], noise[draw], ensemble
                        )
            return found[:, list(pictures)]

        everyone = range(batch)
        if target_error is None:
            return ScoreOutput(*mean_and_standard_error(draws(everyone, 0, num_draws)))
        return score_to_target(draws, batch, target_error, max_draws)

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
            adaptive: score at one noise level after another and stop when it is decided which side leads
                (`config.adaptive`); noise_levels and num_draws are not used then.
        """
        if adaptive:
            return self.compare_adaptively(prompt, image_a, image_b, seed).probability
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
    def compare_adaptively(
        self, prompt: str, image_a: Any, image_b: Any, seed: Any = 0
    ) -> AdaptiveComparison:
        """An adaptive `compare` that also says how many levels it took.

        Raises:
            InvalidInputError: the reward has not learned levels.
        """
        self._require_trained(None)
        check_prompts([prompt])
        (seed,) = resolve_seeds(seed, 1)
        pictures = _two_images(image_a, image_b)
        latents = self._need_encoders("images", "vae").encode_images(pictures, self.device)
        seed = mix_seeds(seed, text_seed(prompt))  # its own noise, as when levels were learned
        return compare_adaptively(self, self.encode_prompts(prompt), latents, seed)

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
            adaptive: as in `compare`: pictures are scored until each is decided against its neighbours.
                Scores are then in probits: P(a preferred to b) = Phi(score_a - score_b).
        """
        check_prompts([prompt])
        (seed,) = resolve_seeds(seed, 1)
        listed = image_list(images)
        if adaptive:
            self._require_trained(None)
            latents = self._need_encoders("images", "vae").encode_images(listed, self.device)
            seed = mix_seeds(seed, text_seed(prompt))
            return rank_adaptively(self, self.encode_prompts(prompt), listed, latents, seed)
        scores = self.score(prompt, listed, noise_levels, seed, num_draws=num_draws).scores.tolist()
        ranked = [
            RankedImage(index, image, score)
            for index, (image, score) in enumerate(zip(listed, scores, strict=True))
        ]
        return sorted(ranked, key=lambda item: -item.score)

    # ------------------------------------------------------------------------------------- saving

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
