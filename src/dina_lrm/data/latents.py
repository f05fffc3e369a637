"""Preference pairs as latents: what a reward is trained and measured on.

Each image is encoded once, however many pairs it is in, and each prompt once, however many images. A
`LatentPairs` holds one latent size and fits in memory; it is one safetensors file on disk. The order of
batches is a pure function of (seed, step), so resuming a run is arithmetic and no loader has a state.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dina_lrm.core.tensors import Latents
from dina_lrm.data.pairs import PreferencePair, Reject, load_image
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import written_aside

__all__ = ["LatentPairs", "PairBatch", "batch_indices", "encode_pairs", "mix_seeds"]

_FORMAT = "dina-lrm latent pairs 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """Some pairs, gathered: row i of every tensor belongs to pair i."""

    latents_chosen: Latents
    latents_rejected: Latents
    prompt_embeds: Float[Tensor, "batch token dim"]
    pooled_prompt_embeds: Float[Tensor, "batch pooled"] | None
    attention_mask: Tensor | None
    target: Float[Tensor, " batch"]
    distinct: Int64[Tensor, " distinct"]
    """Rows of [latents_chosen; latents_rejected] that have to be scored: an image once per noise draw."""
    position: Int64[Tensor, " sides"]
    """Of each of the 2 x batch sides, where in `distinct` its image stands."""

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same on a device, in float32; converted there, so that stored precision is what travels."""
        tensors: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(device, non_blocking=True)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
        return PairBatch(**tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentPairs:
    """Pairs that point into a table of latents and a table of prompts.

    `target` is the share of votes for `chosen`, below 0.5 when a majority preferred the other side.
    `bayes`, known only for simulated raters, is the probability under their law that `chosen` is preferred.
    """

    latents: Float[Tensor, "image channel *frame height width"]
    """Already shifted and scaled; float16 or float32. A video has a frame axis before height."""
    prompts: list[str]
    prompt_embeds: Float[Tensor, "prompt token dim"]
    prompt_index: Int64[Tensor, " pair"]
    """Row of `prompts` of each pair."""
    chosen: Int64[Tensor, " pair"]
    """Row of `latents` of each pair's preferred image."""
    rejected: Int64[Tensor, " pair"]
    """Row of `latents` of each pair's other image."""
    target: Float[Tensor, " pair"]
    pooled_prompt_embeds: Float[Tensor, "prompt pooled"] | None = None
    attention_mask: Tensor | None = None
    """(prompt, token) where the backbone uses one."""
    bayes: Float[Tensor, " pair"] | None = None
    latent_space: str | None = None
    """VAE class and normalisation the latents come from; None: not known. Many families have 16 channels."""

    def __post_init__(self) -> None:
        num_images, num_prompts = len(self.latents), len(self.prompts)
        if self.latents.ndim not in (4, 5):
            raise InvalidInputError(
                f"latents have shape {tuple(self.latents.shape)}: need (image, channel, height, width), "
                "or a frame axis before height"
            )
        for name in ("prompt_embeds", "pooled_prompt_embeds", "attention_mask"):
            table = getattr(self, name)
            if table is not None and len(table) != num_prompts:
                raise InvalidInputError(f"{name} has {len(table)} rows for {num_prompts} prompts")
        for name, limit in (("prompt_index", num_prompts), ("chosen", num_images), ("rejected", num_images)):
            rows = getattr(self, name)
            if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < limit):
                raise InvalidInputError(f"{name} points to row {int(rows.max())} of a table of {limit}")
        for name in ("prompt_index", "rejected", "target", "bayes"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.chosen):
                raise InvalidInputError(f"{name} has {len(column)} entries for {len(self.chosen)} pairs")
        for name in ("target", "bayes"):
            column = getattr(self, name)
            if column is not None and not bool(((column >= 0) & (column <= 1)).all()):  # NaN fails too
                raise InvalidInputError(f"{name} must lie in [0, 1] for every pair")
        if not bool(torch.isfinite(self.latents).all()):
            bad = (~torch.isfinite(self.latents).flatten(1).all(1)).nonzero().flatten().tolist()
            raise InvalidInputError(f"latents are not finite in {len(bad)} images, first in row {bad[0]}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def num_prompts(self) -> int:
        """Prompts that at least one pair uses: the number of clusters in a bootstrap."""
        return len(self.prompt_index.unique())

    def batch(
        self,
        indices: Tensor | Sequence[int],
        *,
        draws: Int64[Tensor, " batch"] | None = None,
    ) -> PairBatch:
        """Gather the pairs of these indices, in this order, as float32.

        Args:
            draws: which noise draw each pair uses. Pairs of one prompt and one draw share what is computed
                for an image that is in several of them. None: every pair has a draw of its own.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        distinct, position = distinct_images(self.chosen[rows], self.rejected[rows], draws)

        def gather(table: Tensor | None, index: Tensor) -> Any:
            if table is None:
                return None
            picked = table.index_select(0, index)
            return picked.float() if picked.is_floating_point() else picked

        prompt = self.prompt_index[rows]
        mask, embeds = self.attention_mask, self.prompt_embeds
        if mask is not None:  # as long as the longest prompt of the batch
            length = int(mask[prompt].any(dim=0).nonzero().max()) + 1
            mask, embeds = mask[:, :length], embeds[:, :length]
        return PairBatch(
            latents_chosen=gather(self.latents, self.chosen[rows]),
            latents_rejected=gather(self.latents, self.rejected[rows]),
            prompt_embeds=gather(embeds, prompt),
            pooled_prompt_embeds=gather(self.pooled_prompt_embeds, prompt),
            attention_mask=gather(mask, prompt),
            target=gather(self.target, rows),
            distinct=distinct,
            position=position,
        )

    def order(
        self, step: int, *, batch_size: int, seed: int, by_prompt: bool = False
    ) -> Int64[Tensor, " batch"]:
        """Indices of the pairs of a step: see `batch_indices`."""
        groups = self.prompt_index if by_prompt else None
        return batch_indices(len(self), batch_size, seed=seed, step=step, groups=groups)

    def parts(self, indices: Tensor, size: int) -> Sequence[Tensor]:
        """The same pairs in parts of at most `size`, each of one latent shape: here all are."""
        return indices.split(size)

    @property
    def examples(self) -> Int64[Tensor, " shape"]:
        """One pair of each latent shape."""
        return torch.arange(min(1, len(self)))

    def subset(self, indices: Tensor | Sequence[int]) -> "LatentPairs":
        """The pairs of these indices; the tables of latents and prompts are shared, not copied."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            prompt_index=self.prompt_index[rows],
            chosen=self.chosen[rows],
            rejected=self.rejected[rows],
            target=self.target[rows],
            bayes=None if self.bayes is None else self.bayes[rows],
        )

    def split_by_prompt(self, fraction: float, *, seed: int = 0) -> tuple["LatentPairs", "LatentPairs"]:
        """Two parts that share no prompt; the second holds about `fraction` of the prompts."""
        held_out = drawn_prompts(self.prompt_index, fraction, seed)
        return self.subset((~held_out).nonzero().flatten()), self.subset(held_out.nonzero().flatten())

    def fingerprint(self) -> str:
        """Changes when the pairs, their order, their targets or the latents' values change."""
        digest = hashlib.sha256(json.dumps([self.prompts, list(self.latents.shape)]).encode())
        for column in (self.prompt_index, self.chosen, self.rejected, self.target, self.latents):
            digest.update(column.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def picture(self) -> Int64[Tensor, " image"]:
        """Number of the picture in each row of `latents`; rows of equal content are one picture."""
        rows = self.latents.cpu().contiguous().numpy()
        known: dict[bytes, int] = {}
        digests = (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
        return torch.tensor([known.setdefault(one, len(known)) for one in digests], dtype=torch.int64)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        tensors = {
            field.name: value.cpu().contiguous()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        metadata = {"format": _FORMAT, "prompts": json.dumps(self.prompts)}
        if self.latent_space is not None:
            metadata["latent_space"] = self.latent_space
        with written_aside(Path(path)) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "LatentPairs":
        """Read a file that `save` wrote; anything else is an error that says why."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no latent pairs at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise InvalidInputError(f"{path} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise InvalidInputError(f"{path} holds {metadata.get('format')!r}, not {_FORMAT!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(tensors) - known)
        missing = sorted(
            {"latents", "prompt_embeds", "prompt_index", "chosen", "rejected", "target"} - set(tensors)
        )
        if unknown or missing:
            raise InvalidInputError(f"{path}: missing tensors {missing}, unknown tensors {unknown}")
        space = metadata.get("latent_space")
        return cls(prompts=json.loads(metadata["prompts"]), latent_space=space, **tensors)

    @classmethod
    def concatenate(cls, parts: Sequence["LatentPairs"]) -> "LatentPairs":
        """All pairs of several sets, in order; a prompt that two sets share stays two.

        Raises:
            InvalidInputError: there are no sets, their latents or prompt embeddings differ in shape, their
                latents come from different VAEs, or only some of them have a pooled embedding, a mask, or a
                known law of the raters.
        """
        if not parts:
            raise InvalidInputError("there are no pairs to join")
        parts = _equal_tokens(parts)
        tables: dict[str, Tensor | None] = {}
        for name in ("latents", "prompt_embeds", "pooled_prompt_embeds", "attention_mask", "target", "bayes"):
            values = [getattr(part, name) for part in parts]
            shapes = {None if value is None else tuple(value.shape[1:]) for value in values}
            if len(shapes) > 1:
                raise InvalidInputError(f"sets of pairs differ in {name}: shapes {sorted(map(str, shapes))}")
            tables[name] = None if values[0] is None else torch.cat(values)
        spaces = {part.latent_space for part in parts}
        if len(spaces) > 1:
            raise InvalidInputError(f"sets of pairs come from different VAEs: {sorted(map(str, spaces))}")
        rows: dict[str, list[Tensor]] = {"prompt_index": [], "chosen": [], "rejected": []}
        num_images = num_prompts = 0
        for part in parts:
            rows["prompt_index"].append(part.prompt_index + num_prompts)
            rows["chosen"].append(part.chosen + num_images)
            rows["rejected"].append(part.rejected + num_images)
            num_images, num_prompts = num_images + len(part.latents), num_prompts + len(part.prompts)
        columns: dict[str, Any] = tables | {name: torch.cat(column) for name, column in rows.items()}
        prompts = [prompt for part in parts for prompt in part.prompts]
        return cls(prompts=prompts, latent_space=spaces.pop(), **columns)


def _equal_tokens(parts: Sequence[LatentPairs]) -> Sequence[LatentPairs]:
    """Prompts of different length, padded and masked, where a mask says that padding is not looked at."""
    length = max(part.prompt_embeds.shape[1] for part in parts)
    if all(part.attention_mask is None for part in parts):
        return parts
    padded = []
    for part in parts:
        mask = part.attention_mask
        if mask is None:
            mask = torch.ones(part.prompt_embeds.shape[:2], dtype=torch.long)
        more = length - mask.shape[1]
        embeds = torch.nn.functional.pad(part.prompt_embeds, (0, 0, 0, more))
        mask = torch.nn.functional.pad(mask, (0, more))
        padded.append(replace(part, prompt_embeds=embeds, attention_mask=mask))
    return padded


# --- order -------------------------------------------------------------------------------------------------


def mix_seeds(*parts: int) -> int:
    """One 63-bit seed from several, so that (0, 1) and (1, 0) give unrelated streams.

    >>> mix_seeds(0, 1) != mix_seeds(1, 0)
    True
    """
    word = np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(1))


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix_seeds(seed, epoch)))


def first_occurrences(values: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first occurrence of each distinct row, and for every row which of these it equals.

    >>> first_occurrences(torch.tensor([7, 7, 3, 7, 3]))
    (tensor([2, 0]), tensor([1, 1, 0, 1, 0]))
    """
    member = values.unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(member.max()) + 1,), len(values))
    return first.scatter_reduce_(0, member, torch.arange(len(values)), "amin"), member


def distinct_images(chosen: Tensor, rejected: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
    """`PairBatch.distinct` and `position` of a batch: an image counts once for each noise draw.

    Args:
        chosen, rejected: number of the image on either side of each pair.
        draws: which draw each pair uses; None: one of its own.
    """
    own = torch.arange(len(chosen)) if draws is None else draws
    return first_occurrences(torch.stack([own.repeat(2), torch.cat([chosen, rejected])], dim=1))


def drawn_prompts(prompt_index: Int64[Tensor, " pair"], fraction: float, seed: int) -> Tensor:
    """Which pairs belong to prompts that are drawn, about `fraction` of all."""
    prompts = prompt_index.unique()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return torch.isin(prompt_index, prompts[order[: round(fraction * len(prompts))]])


def batch_indices(
    num_pairs: int, batch_size: int, *, seed: int, step: int, groups: Int64[Tensor, " pair"] | None = None
) -> Int64[Tensor, " batch"]:
    """Which pairs are in the batch of `step`: a pure function, the same on every machine and worker.

    Epochs follow one another without a gap, each in an order of its own, so a batch may hold the end of
    one and the start of the next, and every pair is seen exactly once per epoch:
    position p = step * batch_size + i is entry p mod num_pairs of the order of epoch p div num_pairs.
    With `groups`, such as prompts, the groups are shuffled, and the pairs of one stay together.
    """
    if num_pairs < 1:
        raise InvalidInputError("there are no pairs to draw a batch from")

    def epoch_order(epoch: int) -> Tensor:
        if groups is None:
            return _permutation(num_pairs, seed, epoch)
        return _permutation(int(groups.max()) + 1, seed, epoch)[groups].argsort(stable=True)

    start, stop = step * batch_size, (step + 1) * batch_size
    parts = [
        epoch_order(epoch)[max(start - epoch * num_pairs, 0) : stop - epoch * num_pairs]
        for epoch in range(start // num_pairs, (stop - 1) // num_pairs + 1)
    ]
    return torch.cat(parts)


# --- encoding ----------------------------------------------------------------------------------------------


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

    problems: dict[int, str] = {}
    encoded: dict[int, Tensor] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    for start in range(0, len(sources), batch_size):
        images: list[Image.Image] = []
        kept: list[int] = []
        for row in range(start, min(start + batch_size, len(sources))):
            try:
                image = load_image(sources[row])
            except InvalidInputError as error:
                problems[row] = str(error)
                continue
            if size is not None:
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
            sizes[(image.height, image.width)] += 1
            images.append(image)
            kept.append(row)
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sizes)
            raise InvalidInputError(
                f"pictures of {len(sizes)} sizes ({listed}) do not fit one table of latents: encode_pairs "
                "takes one size, or size=(height, width) to crop to; `dina-lrm prepare`, and training on "
                "rows, take any sizes"
            )
        if images:
            seeds = [mix_seeds(seed, row) for row in kept] if sample else None
            latents = model.encode_images(images, sample=sample, seed=seeds)
            for row, latent in zip(kept, latents.detach().cpu().to(dtype), strict=True):
                if bool(torch.isfinite(latent).all()):
                    encoded[row] = latent
                else:
                    problems[row] = "latent is not finite"
        if on_progress is not None:
            on_progress(min(start + batch_size, len(sources)), len(sources))

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
