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
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dina_lrm.data.buckets import BucketOrder, same_bucket
from dina_lrm.data.latents import (
    LatentPairs,
    PairBatch,
    distinct_images,
    drawn_prompts,
    first_occurrences,
)
from dina_lrm.data.split import fold_prompt, held_out
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import written_aside

__all__ = [
    "LatentShards",
    "PairSet",
    "PromptRow",
    "PromptTable",
    "no_shards",
    "prompt_hash",
    "set_aside",
    "write_pairs",
    "write_prompts",
]

FORMAT = "dina-lrm latent shards 1"
CACHE_BYTES = 2 << 30
"""Row groups kept in memory by a reader."""
PROMPT_GROUP_BYTES = 16 << 20
"""Embeddings in a row group of prompts, about."""
SMALL_COLUMNS = ["prompt", "target", "chosen", "rejected", "latent_shape"]


def prompt_hash(prompt: str) -> str:
    """Key of a prompt: 128 bits of its text.

    >>> prompt_hash("a red circle")
    '0ef7583c3ce18fee716bd6a7c8328fe5'
    """
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


# --- writing -----------------------------------------------------------------------------------------------


def _pair_schema(metadata: Mapping[str, str]) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.float32()
    columns = [
        ("prompt", text),
        ("prompt_hash", text),
        ("target", number),
        ("votes_chosen", number),
        ("votes_rejected", number),
        ("confidence", number),
        ("source", text),
        ("file", text),
        ("row", pa.int64()),
        ("chosen", text),
        ("rejected", text),
        ("latent_shape", pa.list_(pa.int32())),
        ("latents_chosen", pa.binary()),
        ("latents_rejected", pa.binary()),
    ]
    return pa.schema(columns, metadata=dict(metadata))


def write_pairs(
    path: Path,
    groups: Sequence[Sequence[Mapping[str, Any]]],
    *,
    rejects: Sequence[Mapping[str, Any]],
    num_items: int,
    pictures: Mapping[str, str | None],
) -> None:
    """One shard: a row group for each of `groups`, whose rows have one latent shape; whole or not at all.

    Args:
        rejects: of the part of the source that the shard covers; kept in the file, so that a shard accounts
            for everything it was made from.
        num_items: comparisons and rejects that the part holds.
        pictures: digest of every file that was looked at for it, by name; None for one that was not there.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    metadata = {"format": FORMAT, "num_items": str(num_items), "rejects": json.dumps(list(rejects))}
    metadata["pictures"] = json.dumps(dict(pictures))
    schema = _pair_schema(metadata)
    large = ("latents_chosen", "latents_rejected")
    options: Any = {
        "compression": {name: "NONE" if name in large else "ZSTD" for name in schema.names},
        "use_dictionary": ["prompt", "prompt_hash", "source", "file"],
        "write_statistics": ["row", "target"],
        "data_page_size": 64 << 20,
    }
    with written_aside(path) as partial, parquet.ParquetWriter(partial, schema, **options) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(list(rows), schema=schema), row_group_size=len(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """What a backbone reads of one prompt."""

    prompt_embeds: Float[Tensor, "token dim"]
    pooled_prompt_embeds: Float[Tensor, " pooled"] | None
    attention_mask: Tensor | None
    """(token,) where the backbone uses one; padding at the end is cut off."""


def write_prompts(
    path: Path, prompts: Sequence[str], rows: Sequence[PromptRow], *, dtype: torch.dtype
) -> None:
    """One file of embeddings, stored as float16 or float32.

    Raises:
        InvalidInputError: an embedding is not finite at that precision.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def content(tensor: Tensor | None, prompt: str) -> bytes | None:
        if tensor is None:
            return None
        stored = tensor.detach().cpu().to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise InvalidInputError(
                f"the embedding of prompt {prompt!r} is not finite in {str(dtype).removeprefix('torch.')}"
            )
        return stored.contiguous().numpy().tobytes()

    records = [
        {
            "prompt": prompt,
            "prompt_hash": prompt_hash(prompt),
            "embeds_shape": list(row.prompt_embeds.shape),
            "prompt_embeds": content(row.prompt_embeds, prompt),
            "pooled_prompt_embeds": content(row.pooled_prompt_embeds, prompt),
            "attention_mask": None
            if row.attention_mask is None
            else row.attention_mask.cpu().to(torch.uint8).numpy().tobytes(),
        }
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    schema = pa.schema(
        [
            ("prompt", pa.string()),
            ("prompt_hash", pa.string()),
            ("embeds_shape", pa.list_(pa.int32())),
            ("prompt_embeds", pa.binary()),
            ("pooled_prompt_embeds", pa.binary()),
            ("attention_mask", pa.binary()),
        ],
        metadata={"format": FORMAT, "dtype": str(dtype).removeprefix("torch.")},
    )
    largest = max(len(record["prompt_embeds"]) for record in records)
    with (
        written_aside(path) as partial,
        parquet.ParquetWriter(
            partial, schema, compression="NONE", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        table = pa.Table.from_pylist(records, schema=schema)
        writer.write_table(table, row_group_size=max(1, PROMPT_GROUP_BYTES // max(largest, 1)))


# --- reading -----------------------------------------------------------------------------------------------


class _RowGroups:
    """Row groups of several files, the last used kept in memory."""

    def __init__(self, columns: Sequence[str], cache_bytes: int = CACHE_BYTES) -> None:
        self.columns, self.cache_bytes = list(columns), cache_bytes
        self.tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, file: Path, group: int) -> Any:
        """The table of one row group."""
        key = file, group
        with self.lock:
            if key not in self.tables:
                table = _open(file).read_row_group(group, columns=self.columns).combine_chunks()
                while self.tables and sum(t.nbytes for t in self.tables.values()) > self.cache_bytes:
                    self.tables.popitem(last=False)
                self.tables[key] = table
            self.tables.move_to_end(key)
            return self.tables[key]


def _open(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        opened = parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InvalidInputError(f"{file} is missing or damaged: {error}") from error
    found = (opened.schema_arrow.metadata or {}).get(b"format", b"").decode()
    if found != FORMAT:
        raise InvalidInputError(f"{file} holds {found!r}, not {FORMAT!r}")
    return opened


def shard_rejects(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Rejects of the part that a shard covers, and the number of items of that part."""
    metadata = _open(file).schema_arrow.metadata
    return json.loads(metadata[b"rejects"]), int(metadata[b"num_items"])


def shard_pictures(file: Path) -> dict[str, str | None]:
    """Digests of the picture files behind a shard, see `write_pairs`."""
    return json.loads(_open(file).schema_arrow.metadata.get(b"pictures", b"{}"))


def shard_prompts(file: Path) -> list[str]:
    """Distinct prompts of a shard, in order of appearance."""
    column = _open(file).read(columns=["prompt"]).column("prompt")
    return list(dict.fromkeys(column.to_pylist()))


def _halves(content: Any) -> Tensor:
    """float16 numbers of a buffer, without a copy: valid as long as its table is."""
    import pyarrow as pa

    return torch.from_dlpack(pa.Array.from_buffers(pa.float16(), content.size // 2, [None, content]))


def _tensor(content: Any, dtype: np.dtype, shape: Sequence[int]) -> Tensor:
    """A copy, since the buffer belongs to the cache."""
    return torch.from_numpy(np.frombuffer(content, dtype=dtype).reshape(shape).astype(np.float32))


class PromptTable:
    """Embeddings of prompts by their text, read from files when they are asked for."""

    def __init__(self, files: Sequence[Path], cache_bytes: int = CACHE_BYTES) -> None:
        names = ["prompt_embeds", "embeds_shape", "pooled_prompt_embeds", "attention_mask"]
        self.read = _RowGroups(names, cache_bytes)
        self.places: dict[str, tuple[Path, int, int]] = {}
        self.dtypes: dict[Path, np.dtype] = {}
        for file in files:
            opened = _open(file)
            self.dtypes[file] = np.dtype(opened.schema_arrow.metadata[b"dtype"].decode())
            for group in range(opened.num_row_groups):
                hashes = opened.read_row_group(group, columns=["prompt_hash"]).column(0).to_pylist()
                self.places |= {one: (file, group, row) for row, one in enumerate(hashes)}

    def __call__(self, prompts: Sequence[str]) -> list[PromptRow]:
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> PromptRow:
        place = self.places.get(prompt_hash(prompt))
        if place is None:
            raise InvalidInputError(f"no embedding of prompt {prompt!r} among {len(self.places)}")
        file, group, row = place
        table = self.read(file, group)
        cells = {name: table.column(name)[row] for name in table.column_names}

        def tensor(name: str, shape: Sequence[int]) -> Tensor | None:
            cell = cells[name]
            return _tensor(cell.as_buffer(), self.dtypes[file], shape) if cell.is_valid else None

        embeds = tensor("prompt_embeds", cells["embeds_shape"].as_py())
        assert embeds is not None
        mask = cells["attention_mask"]
        return PromptRow(
            prompt_embeds=embeds,
            pooled_prompt_embeds=tensor("pooled_prompt_embeds", (-1,)),
            attention_mask=torch.from_numpy(np.frombuffer(mask.as_buffer(), np.uint8).astype(np.int64))
            if mask.is_valid
            else None,
        )


def stack_prompts(rows: Sequence[PromptRow]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Embeddings, pooled embeddings and mask of a batch, as long as its longest prompt.

    Raises:
        InvalidInputError: prompts of different length, and no mask that says what padding is.
    """
    length = max(len(row.prompt_embeds) for row in rows)
    masked = [row.attention_mask for row in rows if row.attention_mask is not None]
    if len(masked) not in (0, len(rows)) or (
        not masked and any(len(row.prompt_embeds) != length for row in rows)
    ):
        raise InvalidInputError("prompts of different length need an attention mask each")

    def padded(tensor: Tensor) -> Tensor:
        more = length - len(tensor)
        return torch.nn.functional.pad(tensor, (0, 0, 0, more) if tensor.ndim == 2 else (0, more))

    pooled = [row.pooled_prompt_embeds for row in rows]
    return (
        torch.stack([padded(row.prompt_embeds) for row in rows]),
        None if pooled[0] is None else torch.stack([one for one in pooled if one is not None]),
        torch.stack([padded(mask) for mask in masked]) if masked else None,
    )


def no_shards(folder: Path) -> str:
    """Why a folder without a manifest cannot be read."""
    if (folder / "prepare.json").is_file():
        return f"`dina-lrm prepare` of {folder} was not finished: run it again, it goes on where it stopped"
    if any((folder / part / "prepare.json").is_file() for part in ("train", "test")):
        return (
            f"{folder} was split by `dina-lrm prepare --test-fraction`: train on {folder / 'train'}, "
            f"evaluate on {folder / 'test'}"
        )
    return f"{folder} holds no latent shards: no manifest.json"


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
    """Of `dina-lrm prepare`, as the manifest states them."""
    num_rejects: int
    """Comparisons of the source that could not be used; rejects.jsonl lists them."""
    latent_space: str | None = None
    _read: _RowGroups = field(default_factory=lambda: _RowGroups(["latents_chosen", "latents_rejected"]))
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
        columns = _Columns()
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
            _read=_RowGroups(["latents_chosen", "latents_rejected"], cache_bytes),
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
        """The law of the raters is not known."""

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
                latents[side, entry].copy_(_halves(table.column(name)[row].as_buffer()).view(shape))
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


class _Columns:
    """The small columns of all shards, gathered."""

    def __init__(self) -> None:
        self.places: list[tuple[Path, int]] = []
        self.shapes: dict[tuple[int, ...], int] = {}
        self.prompts: dict[str, int] = {}
        self.images: dict[tuple[str, int], int] = {}
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, file: Path) -> None:
        opened = _open(file)
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=SMALL_COLUMNS)
            shapes = {tuple(shape) for shape in table.column("latent_shape").to_pylist()}
            if len(shapes) != 1:
                raise InvalidInputError(f"{file}: row group {group} has latents of {len(shapes)} shapes")
            bucket = self.shapes.setdefault(shapes.pop(), len(self.shapes))
            count = table.num_rows

            def numbered(names: Iterator[Any], known: dict[Any, int]) -> np.ndarray:
                return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)

            def pictures(side: str, table: Any = table, bucket: int = bucket) -> Iterator[tuple[str, int]]:
                return ((name, bucket) for name in table.column(side).to_pylist())

            self.parts.append(
                {
                    "row_group": np.full(count, len(self.places), dtype=np.int64),
                    "row": np.arange(count, dtype=np.int64),
                    "bucket": np.full(count, bucket, dtype=np.int64),
                    "chosen": numbered(pictures("chosen"), self.images),
                    "rejected": numbered(pictures("rejected"), self.images),
                    "prompt_index": numbered(iter(table.column("prompt").to_pylist()), self.prompts),
                    "target": table.column("target").to_numpy().astype(np.float32),
                }
            )
            self.places.append((file, group))

    def tensors(self) -> dict[str, Any]:
        if not self.parts:
            raise InvalidInputError("the shards hold no pairs: see rejects.jsonl")
        columns = {
            name: torch.from_numpy(np.concatenate([part[name] for part in self.parts]))
            for name in self.parts[0]
        }
        names: dict[str, int] = {}
        return {
            "places": self.places,
            "shapes": list(self.shapes),
            "prompts": list(self.prompts),
            "picture": torch.tensor([names.setdefault(name, len(names)) for name, _ in self.images]),
            **columns,
        }
