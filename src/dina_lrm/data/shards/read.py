"""Latent shards on disk: pairs of latents in parquet, read a row group at a time, in an order that is a
function.

    LATENTS/pairs/part-00000.parquet      a row a pair; a row group holds one latent shape
    LATENTS/prompts/part-00000.parquet    a row a prompt: its embeddings, once
    LATENTS/rejects.jsonl                 what could not be used, and why
    LATENTS/manifest.json                 counts, settings, digests; written last

`datasets.load_dataset(LATENTS, "pairs")` reads them too: latents are float16 bytes in C order, and
`np.frombuffer(row["latents_chosen"], np.float16).reshape(row["latent_shape"])` is one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dina_lrm.data.buckets import BucketOrder, same_bucket
from dina_lrm.data.latents import LatentPairs, PairBatch
from dina_lrm.data.order import distinct_images, drawn_prompts, first_occurrences
from dina_lrm.data.shards.columns import CACHE_BYTES, Columns, RowGroups, halves, no_shards
from dina_lrm.data.shards.prompts import PromptTable, stack_prompts
from dina_lrm.data.shards.write import FORMAT, PromptRow
from dina_lrm.data.split import fold_prompt, held_out
from dina_lrm.errors import InvalidInputError

__all__ = ["LatentShards", "PairSet", "set_aside"]


# --- writing -----------------------------------------------------------------------------------------------


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentShards:
    """Pairs in a folder that `dina-lrm prepare` wrote; latents stay on disk until a batch needs them.

    The columns here are one entry a pair, of all shards in order.
    """

    folder: Path
    places: list[tuple[Path, int]]
    """File and row group, by row group."""
    row_group: Int64[Tensor, " pair"]
    """Row of `places`."""
    row: Int64[Tensor, " pair"]
    """Within the row group."""
    bucket: Int64[Tensor, " pair"]
    """Row of `shapes`."""
    shapes: list[tuple[int, ...]]
    """(channel, *frame, height, width) of each bucket."""
    chosen: Int64[Tensor, " pair"]
    """Number of the picture among all pictures, a picture at two sizes counting as two."""
    rejected: Int64[Tensor, " pair"]
    picture: Int64[Tensor, " image"]
    """By the number in `chosen` or `rejected`: the number of the picture, whatever its size."""
    prompts: list[str]
    prompt_index: Int64[Tensor, " pair"]
    target: Float[Tensor, " pair"]
    """Share of votes for `chosen`."""
    digests: dict[str, str]
    """SHA-256 of every shard."""
    read_prompts: Callable[[Sequence[str]], list[PromptRow]]
    settings: Mapping[str, Any]
    """Settings of `dina-lrm prepare`, as the manifest states them."""
    num_rejects: int
    """Comparisons of the source that could not be used; rejects.jsonl lists them."""
    latent_space: str | None = None
    _read: RowGroups = field(default_factory=lambda: RowGroups(["latents_chosen", "latents_rejected"]))
    _orders: dict[Any, BucketOrder] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        encode: Callable[[Sequence[str]], list[PromptRow]] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> "LatentShards":
        """Read everything but latents and embeddings.

        Args:
            folder: from `dina-lrm prepare`.
            encode: makes embeddings of prompts on the fly, for a folder prepared without them.
            cache_bytes: of row groups kept in memory, for latents and for prompts each.

        Raises:
            InvalidInputError: the folder is none of ours, was not finished, or a file of it is damaged or
                missing; there are no embeddings and no `encode`.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError as error:
            raise InvalidInputError(no_shards(folder)) from error
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"{folder / 'manifest.json'} is damaged: {error}") from error
        if manifest.get("format") != FORMAT:
            raise InvalidInputError(f"{folder} holds {manifest.get('format')!r}, not {FORMAT!r}")
        missing = [name for name in manifest["digests"] if not (folder / name).is_file()]
        if missing:
            raise InvalidInputError(f"{folder} lacks {len(missing)} of its files, first: {missing[0]}")
        names = sorted(manifest["digests"])
        tables = [folder / name for name in names if name.startswith("prompts/")]
        if tables:
            read_prompts: Callable[[Sequence[str]], list[PromptRow]] = PromptTable(tables, cache_bytes)
        elif encode is not None:
            read_prompts = encode
        else:
            raise InvalidInputError(f"{folder} was prepared without embeddings: give a way to encode prompts")
        columns = Columns()
        for name in names:
            if name.startswith("pairs/"):
                columns.add(folder / name)
        return cls(
            folder=folder,
            digests=manifest["digests"],
            read_prompts=read_prompts,
            settings=manifest["settings"],
            num_rejects=sum(manifest["counts"]["rejects"].values()),
            latent_space=manifest["settings"].get("latent_space"),
            _read=RowGroups(["latents_chosen", "latents_rejected"], cache_bytes),
            **columns.tensors(),
        )

    def __len__(self) -> int:
        return len(self.target)

    @property
    def num_prompts(self) -> int:
        """Prompts that at least one pair uses."""
        return len(self.prompt_index.unique())

    def fingerprint(self) -> str:
        """Changes when the pairs, their order, their targets or the latents' values change."""
        digest = hashlib.sha256(json.dumps(sorted(self.digests.items())).encode())
        for column in (self.row_group, self.row, self.target):
            digest.update(column.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def subset(self, indices: Tensor | Sequence[int]) -> "LatentShards":
        """The pairs of these indices; files and caches are shared."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        names = ("row_group", "row", "bucket", "chosen", "rejected", "prompt_index", "target")
        return replace(self, _orders={}, **{name: getattr(self, name)[rows] for name in names})

    def split_by_prompt(self, fraction: float, *, seed: int = 0) -> tuple["LatentShards", "LatentShards"]:
        """Two parts that share no prompt; the second holds about `fraction` of the prompts."""
        held_out = drawn_prompts(self.prompt_index, fraction, seed)
        return self.subset((~held_out).nonzero().flatten()), self.subset(held_out.nonzero().flatten())

    @property
    def bayes(self) -> None:
        """The distribution of the raters is not known."""

    def order(
        self, step: int, *, batch_size: int, seed: int, by_prompt: bool = False
    ) -> Int64[Tensor, " batch"]:
        """Indices of the pairs of a step, all of one latent shape: see `buckets.BucketOrder`."""
        key = batch_size, seed, by_prompt
        if key not in self._orders:
            self._orders[key] = BucketOrder(
                self.bucket.numpy(),
                self.row_group.numpy(),
                batch_size=batch_size,
                seed=seed,
                groups=self.prompt_index.numpy() if by_prompt else None,
            )
        return self._orders[key](step)

    @property
    def examples(self) -> Int64[Tensor, " shape"]:
        """One pair of each latent shape."""
        return first_occurrences(self.bucket)[0] if len(self) else torch.arange(0)

    def parts(self, indices: Tensor, size: int) -> Sequence[Tensor]:
        """The same pairs in parts of at most `size`, each of one latent shape."""
        return same_bucket(self.bucket.numpy(), indices, size)

    def batch(self, indices: Tensor | Sequence[int], *, draws: Tensor | None = None) -> PairBatch:
        """Read the pairs of these indices, in this order; see `LatentPairs.batch`. Latents are float16 still.

        Raises:
            InvalidInputError: they are of different latent shapes.
        """
        pairs = torch.as_tensor(indices, dtype=torch.int64)
        shapes = {self.shapes[one] for one in self.bucket[pairs].tolist()}
        if len(shapes) != 1:
            raise InvalidInputError(f"a batch is of one latent shape, these pairs have {sorted(shapes)}")
        shape = shapes.pop()
        latents = torch.empty(2, len(pairs), *shape, dtype=torch.float16)
        for entry, (group, row) in enumerate(
            zip(self.row_group[pairs].tolist(), self.row[pairs].tolist(), strict=True)
        ):
            table = self._read(*self.places[group])
            for side, name in enumerate(("latents_chosen", "latents_rejected")):
                latents[side, entry].copy_(halves(table.column(name)[row].as_buffer()).view(shape))
        distinct, position = distinct_images(self.chosen[pairs], self.rejected[pairs], draws)
        texts = [self.prompts[one] for one in self.prompt_index[pairs].tolist()]
        unique = list(dict.fromkeys(texts))
        rows = dict(zip(unique, self.read_prompts(unique), strict=True))
        embeds, pooled, mask = stack_prompts([rows[text] for text in texts])
        return PairBatch(
            latents_chosen=latents[0],
            latents_rejected=latents[1],
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            attention_mask=mask,
            target=self.target[pairs],
            distinct=distinct,
            position=position,
        )


PairSet = LatentPairs | LatentShards
"""Pairs to train and measure on: in memory, or on disk."""


def set_aside(
    pairs: PairSet, fraction: float, *, max_pairs: int | None = None, seed: int = 0
) -> tuple[PairSet, PairSet]:
    """Pairs to train on and pairs to measure on, which share neither a prompt nor a picture.

    Prompts that differ in case or punctuation alone are one; see `split.held_out`, also for the arguments.
    """
    folded: dict[str, int] = {}
    number = [folded.setdefault(fold_prompt(prompt), len(folded)) for prompt in pairs.prompts]
    picture = pairs.picture.numpy()
    taken = torch.from_numpy(
        held_out(
            np.array(number)[pairs.prompt_index.numpy()],
            picture[pairs.chosen.numpy()],
            picture[pairs.rejected.numpy()],
            fraction=fraction,
            max_pairs=max_pairs,
            seed=seed,
        )
    )
    return pairs.subset((~taken).nonzero().flatten()), pairs.subset(taken.nonzero().flatten())
