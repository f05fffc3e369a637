"""Pictures and prompts of pairs to latents and embeddings in memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dina_lrm.core.noise import torch_seed
from dina_lrm.core.seeds import mix_seeds
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import PreferencePair, Reject, load_image
from dina_lrm.errors import InvalidInputError

__all__ = ["encode_pairs", "encoded_images"]


NOT_FINITE = "latent is not finite"

T = TypeVar("T")
I = TypeVar("I")


def encoded_images(
    sources: Sequence[T],
    load: Callable[[T], I],
    encode: Callable[[list[I], list[int]], Sequence[Tensor] | Tensor],
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float16,
) -> Iterator[Tensor | InvalidInputError]:
    """For each source its latent, (channel, height, width) of `dtype` on the CPU, or why there is none.

    Args:
        load: makes an image of a source; its InvalidInputError is the reason.
        encode: latents of images, given with their places in `sources`.
    """
    for start in range(0, len(sources), batch_size):
        loaded: dict[int, I] = {}
        results: dict[int, Tensor | InvalidInputError] = {}
        places = range(start, min(start + batch_size, len(sources)))
        for place in places:
            try:
                loaded[place] = load(sources[place])
            except InvalidInputError as error:
                results[place] = error
        if loaded:
            with torch.no_grad():
                latents = encode(list(loaded.values()), list(loaded))
            for place, latent in zip(loaded, latents, strict=True):
                stored = latent.cpu().to(dtype)
                finite = bool(torch.isfinite(stored).all())
                results[place] = stored if finite else InvalidInputError(NOT_FINITE)
        yield from (results[place] for place in places)


@runtime_checkable
class _Encodes(Protocol):
    """What `encode_pairs` needs of a reward model."""

    def encode_prompts(self, prompts: list[str]) -> Any: ...

    def encode_images(self, images: Any, *, sample: bool = False, seed: Any = None) -> Any: ...


def encode_pairs(
    model: _Encodes,
    pairs: Sequence[PreferencePair],
    *,
    bayes: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    sample: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float16,
    rejects: list[Reject] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentPairs:
    """Pairs of pictures of one size to latents in memory; prompts and pictures are encoded once each.

    Pictures of any size are encoded by `build.prepare_source`, which is `dina-lrm prepare`.

    Args:
        model: a `RewardModel` over a full pipeline.
        pairs: what to encode.
        bayes: P(chosen is preferred) of each pair, where the raters are simulated.
        size: (height, width) in pixels to crop and resize to. None keeps sizes and then needs one size.
        sample, seed: take a sample of the VAE's posterior, seeded per image, instead of its mean.
        batch_size: images per VAE call.
        dtype: storage of the latents.
        rejects: pairs whose image cannot be decoded or whose latent is not finite are appended here with
            their index and left out. None: they are an error.
        on_progress: called with (images done, images in all).
    """
    if bayes is not None and len(bayes) != len(pairs):
        raise InvalidInputError(f"bayes has {len(bayes)} entries for {len(pairs)} pairs")

    rows: dict[Any, int] = {}  # image identity -> row
    sources: list[Any] = []

    def row_of(source: Any) -> int:
        key = id(source) if isinstance(source, Image.Image) else source
        if key not in rows:
            rows[key] = len(sources)
            sources.append(source)
        return rows[key]

    chosen = [row_of(pair.chosen) for pair in pairs]
    rejected = [row_of(pair.rejected) for pair in pairs]

    sizes: Counter[tuple[int, int]] = Counter()

    def load(source: Any) -> Image.Image:
        image = load_image(source)
        if size is not None:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
        sizes[(image.height, image.width)] += 1
        return image

    def encode(images: list[Image.Image], places: list[int]) -> Tensor:
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sizes)
            raise InvalidInputError(
                f"pictures of {len(sizes)} sizes ({listed}) do not fit one table of latents: encode_pairs "
                "takes one size, or size=(height, width) to crop to; `dina-lrm prepare`, and training on "
                "rows, take any sizes"
            )
        seeds = [torch_seed(mix_seeds(seed, row)) for row in places] if sample else None
        return model.encode_images(images, sample=sample, seed=seeds)

    problems: dict[int, str] = {}
    encoded: dict[int, Tensor] = {}
    for row, latent in enumerate(encoded_images(sources, load, encode, batch_size=batch_size, dtype=dtype)):
        if isinstance(latent, InvalidInputError):
            problems[row] = str(latent)
        else:
            encoded[row] = latent
        if on_progress is not None and ((row + 1) % batch_size == 0 or row + 1 == len(sources)):
            on_progress(row + 1, len(sources))

    good = [i for i in range(len(pairs)) if chosen[i] in encoded and rejected[i] in encoded]
    if len(good) < len(pairs):
        bad = [i for i in range(len(pairs)) if chosen[i] not in encoded or rejected[i] not in encoded]
        listed = [
            Reject(row=i, reason=problems.get(chosen[i]) or problems[rejected[i]], prompt=pairs[i].prompt)
            for i in bad
        ]
        if rejects is None:
            raise InvalidInputError(
                f"{len(bad)} of {len(pairs)} pairs cannot be encoded, first: {listed[0].reason}"
            )
        rejects.extend(listed)
    if not good:
        raise InvalidInputError(f"none of {len(pairs)} pairs can be encoded")

    prompts = list(dict.fromkeys(pairs[i].prompt for i in good))
    prompt_row = {prompt: row for row, prompt in enumerate(prompts)}
    conditioning = model.encode_prompts(prompts)
    table = sorted(encoded)
    position = {row: index for index, row in enumerate(table)}

    def stored(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().cpu().contiguous()

    return LatentPairs(
        latents=torch.stack([encoded[row] for row in table]),
        prompts=prompts,
        prompt_embeds=stored(conditioning.prompt_embeds),
        pooled_prompt_embeds=stored(conditioning.pooled_prompt_embeds),
        attention_mask=stored(getattr(conditioning, "attention_mask", None)),
        prompt_index=torch.tensor([prompt_row[pairs[i].prompt] for i in good]),
        chosen=torch.tensor([position[chosen[i]] for i in good]),
        rejected=torch.tensor([position[rejected[i]] for i in good]),
        target=torch.tensor([pairs[i].target for i in good], dtype=torch.float32),
        bayes=None if bayes is None else torch.tensor([float(bayes[i]) for i in good], dtype=torch.float32),
        latent_space=getattr(model, "latent_space", None),
    )
