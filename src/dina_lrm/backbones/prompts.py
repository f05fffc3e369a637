"""Prompts to conditioning, through the pipeline's own `encode_prompt`, one cached row per prompt."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from dina_lrm.backbones.sharing import apart
from dina_lrm.core.conditioning import Conditioning
from dina_lrm.core.precision import without_autocast
from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.pipelines.libraries import diffusers_class, quiet_loading, quiet_tokenizing
from dina_lrm.pipelines.source import PipelineSource

CACHED_PROMPTS = 512


class _Row(NamedTuple):
    conditioning: Conditioning
    """One row, without padding, on the CPU."""
    cut: str | None
    """What is cut off the prompt, told in words."""
    unknown: tuple[str, ...]
    """Words of it that a tokenizer does not know."""


class PromptEncoder:
    """A pipeline's text encoders, loaded at the first prompt; one subclass per family, beside its backbone.

    Embeddings are kept per prompt, least recently used dropped first, on the CPU: at full size a row takes
    megabytes. After replacing the text encoders of a live pipeline call `clear_cache`.

    Args:
        architecture: of the backbone that will read the embeddings.
        max_text_tokens: tokens per prompt of the longest encoder; None: `max_tokens`, or the tokenizer's own
            limit where that is lower.
    """

    pipeline_class: str
    """The diffusers pipeline whose `encode_prompt` is used."""
    encoders: tuple[str, ...]
    """Its text encoders; "text_encoder_2" goes with "tokenizer_2"."""
    optional_encoders: tuple[str, ...] = ()
    max_tokens: int = 512
    prompts_per_call: int = 32

    def __init__(
        self, source: PipelineSource, architecture: Any, *, max_text_tokens: int | None, dtype: torch.dtype
    ) -> None:
        self.architecture = architecture
        self.max_text_tokens = max_text_tokens
        self._source = source
        self._dtype = dtype
        self._pipeline: Any = None
        self._cache: OrderedDict[str, _Row] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A copy loads its own encoders again: transformers hooks functions on them that cannot be pickled. It
        # keeps the cache, since a prompt encoded beside others would differ in its last bits.
        return self.__dict__ | {"_pipeline": None}

    def encode_batch(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """One row per prompt from the pipeline's `encode_prompt`; no negative prompts."""
        raise NotImplementedError

    def limit(self, pipeline: Any, tokenizer: str) -> int:
        """Tokens of a prompt that the encoder behind `tokenizer` is given, special ones counted."""
        own = int(getattr(getattr(pipeline, tokenizer), "model_max_length", self.max_tokens))
        return self.max_text_tokens or min(self.max_tokens, own)

    def prepare(self, pipeline: Any) -> None:
        """Last touches to a pipeline that was loaded with its text parts only."""

    def clear_cache(self) -> None:
        self._cache.clear()

    def encode(
        self,
        prompts: Sequence[str],
        device: torch.device,
        *,
        on_notes: Callable[[list[str]], None] = lambda notes: None,
    ) -> Conditioning:
        """One row per prompt, in order. Every distinct prompt is encoded once.

        Args:
            on_notes: called with the `notes` of prompts that are encoded now.
        """
        check_prompts(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if new:
            self._encode_new(new, device)
            on_notes(self.notes(new, device))
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        encoded = [self._cache[prompt].conditioning for prompt in prompts]
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return joined_rows(encoded).to(device)

    def _encode_new(self, new: list[str], device: torch.device) -> None:
        pipeline = self._load(device)
        on = device if self._source.live is None else pipeline._execution_device
        for start in range(0, len(new), self.prompts_per_call):
            chunk = new[start : start + self.prompts_per_call]
            # Without the caller's autocast, or the rows kept would be of a precision nobody else asked for.
            with torch.no_grad(), without_autocast(on.type), quiet_tokenizing(pipeline):
                rows = self.encode_batch(pipeline, list(chunk), on).to("cpu")
            for row, prompt in enumerate(chunk):
                single = _without_padding(rows.index_select(torch.tensor([row])))
                self._cache[prompt] = _Row(single, *self._not_seen(prompt, pipeline))

    def encode_empty(self, device: torch.device) -> Conditioning:
        """What classifier-free guidance contrasts prompts with, one row: the empty prompt."""
        pipeline = self._load(device)
        on = device if self._source.live is None else pipeline._execution_device
        with torch.no_grad(), without_autocast(on.type), quiet_tokenizing(pipeline):
            return self.encode_batch(pipeline, [""], on).to(device)

    def _load(self, device: torch.device) -> Any:
        if self._pipeline is None:
            for encoder in self.encoders:
                for component in (encoder, tokenizer_of(encoder)):
                    if not self._source.has(component):
                        raise MissingComponentError(
                            f"pipeline {self._source.name} has no {component}, so prompts cannot be encoded: "
                            f"give a pipeline that has it, or use score_latents with a Conditioning"
                        )
            self._pipeline = (
                self._load_text_pipeline() if self._source.live is None else self._with_own_tokenizers()
            )
        if self._source.live is not None:
            return self._live()
        for name in (*self.encoders, *self.optional_encoders):
            encoder = getattr(self._pipeline, name)
            if encoder is not None:
                encoder.to(device)
        return self._pipeline

    def _with_own_tokenizers(self) -> Any:
        """The live pipeline with tokenizers of our own: they keep what they were last told of padding and
        cutting, so that two threads cannot share one."""
        pipeline = copy.copy(self._source.live)
        for name in map(tokenizer_of, (*self.encoders, *self.optional_encoders)):
            vars(pipeline)[name] = copy.deepcopy(getattr(pipeline, name, None))
        return pipeline

    def _live(self) -> Any:
        """The same for one use, with our own modules over the text encoders' weights as they are now."""
        pipeline = copy.copy(self._pipeline)
        for name in (*self.encoders, *self.optional_encoders):
            encoder = getattr(self._source.live, name, None)
            vars(pipeline)[name] = None if encoder is None else apart(encoder, name)
        return pipeline

    def _load_text_pipeline(self) -> Any:
        source = self._source
        names: list[str] = []
        for encoder in (*self.encoders, *self.optional_encoders):
            for component in (encoder, tokenizer_of(encoder)):
                if source.has(component):
                    names.append(component)
                elif source.declares(component):
                    raise MissingComponentError(
                        f"pipeline {source.name} lists {component} in model_index.json but has no such folder"
                    )
        components = {name for name, value in source.model_index().items() if isinstance(value, list)}
        left_out = dict.fromkeys((components | set(self.optional_encoders)) - set(names))
        left_out |= {tokenizer_of(name): None for name in self.optional_encoders if name in left_out}
        folder = {source.path(name).parent for name in names}.pop()
        pipeline_class = diffusers_class(self.pipeline_class)
        with quiet_loading():
            pipeline: Any = pipeline_class.from_pretrained(
                folder, variant=source.variant, local_files_only=True, **left_out
            )
        for name in (*self.encoders, *self.optional_encoders):
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).to(self._dtype).requires_grad_(False)
        self.prepare(pipeline)
        return pipeline

    def notes(self, prompts: Sequence[str], device: torch.device) -> list[str]:
        """What the encoders do not see of prompts: one note for each that is cut off, one for all words that
        are unknown to a tokenizer."""
        check_prompts(prompts)
        cuts: list[str] = []
        unknown: dict[str, None] = {}
        for prompt in dict.fromkeys(prompts):
            row = self._cache.get(prompt)
            cut, words = self._not_seen(prompt, self._load(device)) if row is None else row[1:]
            cuts += [cut] if cut else []
            unknown |= dict.fromkeys(words)
        words = f"words unknown to the tokenizer, read as unknown: {', '.join(unknown)}"
        return [*cuts, *([words] if unknown else [])]

    def _not_seen(self, prompt: str, pipeline: Any) -> tuple[str | None, tuple[str, ...]]:
        """What is cut off, told in words, and the unknown words."""
        unknown: dict[str, None] = {}
        cut: dict[str, list[str]] = {}
        for encoder in (*self.encoders, *self.optional_encoders):
            name = tokenizer_of(encoder)
            tokenizer = getattr(pipeline, name, None)
            if tokenizer is None:
                continue
            limit = self.limit(pipeline, name)
            lost = _cut_off(tokenizer, prompt, limit)
            if lost:
                cut.setdefault(lost, []).append(f"{encoder} ({limit} tokens)")
            unknown |= dict.fromkeys(_unknown_words(tokenizer, prompt))
        if not cut:
            return None, tuple(unknown)
        losses = "; ".join(f"{', '.join(names)} does not see {lost!r}" for lost, names in cut.items())
        return f"prompt {prompt[:40]!r}... is longer than the encoders read: {losses}", tuple(unknown)


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or many as a list; what is in it is checked by `check_prompts`.

    Raises:
        InvalidInputError: this is neither a prompt nor a sequence of them.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | dict) or not isinstance(prompts, Iterable):
        raise InvalidInputError(f"prompts is a {type(prompts).__name__}: give a string or a list of strings")
    return list(prompts)


def check_prompts(prompts: Sequence[Any]) -> None:
    """Every prompt a string that can be encoded, with something in it."""
    if len(prompts) == 0:
        raise InvalidInputError("no prompts were given")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InvalidInputError(f"prompt {index} is a {type(prompt).__name__}, not a string")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            lone = prompt[error.start]
            raise InvalidInputError(
                f"prompt {index} holds {lone!r} at position {error.start}, half of a character in two parts "
                f"(a surrogate), so it is no text: was an emoji cut in the middle?"
            ) from None
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


def tokenizer_of(encoder: str) -> str:
    """ "text_encoder_2" to "tokenizer_2"."""
    return encoder.replace("text_encoder", "tokenizer")


def _without_padding(row: Conditioning) -> Conditioning:
    """One row cut to its real tokens, where a mask says which they are."""
    if row.attention_mask is None:
        return row
    real = row.attention_mask[0].bool()
    return Conditioning(row.prompt_embeds[:, real], row.pooled_prompt_embeds)


def joined_rows(rows: list[Conditioning]) -> Conditioning:
    """Rows in one batch; rows of different length are padded with zeros and masked."""
    lengths = torch.tensor([row.prompt_embeds.shape[1] for row in rows])
    pooled = [row.pooled_prompt_embeds for row in rows]
    embeds = pad_sequence([row.prompt_embeds[0] for row in rows], batch_first=True)
    mask = None
    if int(lengths.min()) < embeds.shape[1]:
        mask = (torch.arange(embeds.shape[1]) < lengths[:, None]).long()
    return Conditioning(embeds, None if pooled[0] is None else torch.cat(pooled), mask)  # pyright: ignore
