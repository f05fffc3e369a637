"""Prompts to conditioning, through the pipeline's own `encode_prompt`, one cached row per prompt."""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dina_lrm.errors import InvalidInputError, MissingComponentError, PromptWarning
from dina_lrm.models.backbone import Conditioning
from dina_lrm.models.source import PipelineSource

REQUIRED = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
MAX_T5_TOKENS = 256
PROMPTS_PER_CALL = 32
CACHED_PROMPTS = 512


class PromptEncoder:
    """SD3's three text encoders, loaded at the first prompt.

    Embeddings are kept per prompt, least recently used dropped first, on the CPU: at full size a row takes
    megabytes. After changing the text encoders of a live pipeline call `clear_cache`.
    """

    def __init__(self, source: PipelineSource, *, max_text_tokens: int | None, dtype: torch.dtype) -> None:
        self._source = source
        self._max_text_tokens = max_text_tokens
        self._dtype = dtype
        self._pipeline: Any = None
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def clear_cache(self) -> None:
        self._cache.clear()

    def encode(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """One row per prompt, in order. Every distinct prompt is encoded once."""
        check_prompts(prompts)
        pipeline = self._load(device)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        self._warn(new, pipeline)
        for start in range(0, len(new), PROMPTS_PER_CALL):
            chunk = new[start : start + PROMPTS_PER_CALL]
            for prompt, *row in zip(chunk, *self._encode(chunk, pipeline, device), strict=True):
                self._cache[prompt] = (row[0], row[1])
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        rows = [self._cache[prompt] for prompt in prompts]
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        embeds, pooled = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        return Conditioning(embeds, pooled)

    @torch.no_grad()
    def _encode(self, prompts: list[str], pipeline: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        on = device if self._source.live is None else pipeline._execution_device
        with _diffusers_silent():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                prompt_3=None,
                device=on,
                do_classifier_free_guidance=False,
                max_sequence_length=self._t5_tokens(pipeline),
            )
        return embeds.cpu(), pooled.cpu()

    def _t5_tokens(self, pipeline: Any) -> int:
        limit = getattr(pipeline.tokenizer_3, "model_max_length", MAX_T5_TOKENS)
        return self._max_text_tokens or min(MAX_T5_TOKENS, int(limit))

    def _load(self, device: torch.device) -> Any:
        if self._pipeline is None:
            for component in REQUIRED:
                if not self._source.has(component):
                    raise MissingComponentError(
                        f"pipeline {self._source.name} has no {component}, so prompts cannot be encoded: "
                        f"give a pipeline that has it, or use score_latents with a Conditioning"
                    )
            self._pipeline = self._source.live or self._load_text_pipeline()
        if self._source.live is None:
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
                encoder = getattr(self._pipeline, name)
                if encoder is not None:
                    encoder.to(device)
        return self._pipeline

    def _load_text_pipeline(self) -> Any:
        from diffusers import StableDiffusion3Pipeline

        source = self._source
        names = [name for name in (*REQUIRED, "text_encoder_3", "tokenizer_3") if source.has(name)]
        for name in ("text_encoder_3", "tokenizer_3"):
            if name not in names and source.declares(name):
                raise MissingComponentError(
                    f"pipeline {source.name} lists {name} in model_index.json but has no such folder"
                )
        left_out = dict.fromkeys(
            {
                "transformer",
                "scheduler",
                "vae",
                "image_encoder",
                "feature_extractor",
                "text_encoder_3",
                "tokenizer_3",
            }
            - set(names)
        )
        folder = {source.path(name).parent for name in names}.pop()
        source.declares("transformer")  # a hub source fetches model_index.json
        with quiet_loading():
            pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
                folder, variant=source.variant, local_files_only=True, **left_out
            )
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).to(self._dtype).requires_grad_(False)
        if (
            pipeline.text_encoder_3 is None
        ):  # encode_prompt then asks the transformer for the width of the zeros
            config = source.config("transformer", "config.json")
            pipeline.transformer = SimpleNamespace(
                config=SimpleNamespace(joint_attention_dim=config["joint_attention_dim"])
            )
        return pipeline

    def _warn(self, prompts: list[str], pipeline: Any) -> None:
        """Say what the encoders will not see, once per new prompt."""
        unknown: dict[str, None] = {}
        for prompt in prompts:
            cut: dict[str, list[str]] = {}
            for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
                tokenizer = getattr(pipeline, name, None)
                if tokenizer is None:
                    continue
                limit = self._t5_tokens(pipeline) if name == "tokenizer_3" else pipeline.tokenizer_max_length
                lost = _cut_off(tokenizer, prompt, limit)
                if lost:
                    cut.setdefault(lost, []).append(
                        f"{name.replace('tokenizer', 'text_encoder')} ({limit} tokens)"
                    )
                unknown |= dict.fromkeys(_unknown_words(tokenizer, prompt))
            if cut:
                losses = "; ".join(f"{', '.join(names)} does not see {lost!r}" for lost, names in cut.items())
                warnings.warn(
                    f"prompt {prompt[:40]!r}... is longer than the encoders read: {losses}",
                    PromptWarning,
                    stacklevel=4,
                )
        if unknown:
            warnings.warn(
                f"words unknown to the tokenizer, read as unknown: {', '.join(unknown)}",
                PromptWarning,
                stacklevel=4,
            )


def check_prompts(prompts: Sequence[str]) -> None:
    """Every prompt a string with something in it."""
    if len(prompts) == 0:
        raise InvalidInputError("no prompts were given")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InvalidInputError(f"prompt {index} is a {type(prompt).__name__}, not a string")
        if not prompt.strip():
            raise InvalidInputError(f"prompt {index} is empty: there is nothing to compare the picture with")


def _cut_off(tokenizer: Any, prompt: str, limit: int) -> str:
    """The part of the prompt beyond `limit` tokens, start and end tokens counted."""
    room = max(0, limit - tokenizer.num_special_tokens_to_add())
    encoded = tokenizer(
        prompt, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
    )
    if len(encoded.input_ids) <= room:
        return ""
    if tokenizer.is_fast:
        return prompt[encoded.offset_mapping[room][0] :].strip()
    return tokenizer.decode(encoded.input_ids[room:]).strip()


def _unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return []  # CLIP's byte-level vocabulary names an unknown token but never needs it
    if not tokenizer.is_fast:
        pieces = (
            (word, tokenizer(word, add_special_tokens=False, verbose=False).input_ids)
            for word in prompt.split()
        )
        return [word for word, ids in pieces if unknown in ids]
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    return [prompt[start:end].strip() for token, (start, end) in spans if token == unknown]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of the libraries while small files load."""
    import diffusers.utils.logging
    import transformers.utils.logging

    sources = (diffusers.utils.logging, transformers.utils.logging)
    shown = [source.is_progress_bar_enabled() for source in sources]
    try:
        for source in sources:
            source.disable_progress_bar()
        yield
    finally:
        for source, enabled in zip(sources, shown, strict=True):
            if enabled:
                source.enable_progress_bar()


@contextmanager
def _diffusers_silent() -> Iterator[None]:
    """diffusers and transformers log truncation too (for T5 with the wrong words): once, by us, is enough."""
    names = (
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "transformers.tokenization_utils_base",
    )
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
