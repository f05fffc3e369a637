"""Parquet files of shards: row groups that are kept in memory, small columns of all files."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dina_lrm.data.shards.write import FORMAT
from dina_lrm.errors import InvalidInputError

__all__ = [
    "CACHE_BYTES",
    "Columns",
    "RowGroups",
    "halves",
    "no_shards",
    "open_file",
    "shard_pictures",
    "shard_prompts",
    "shard_rejects",
    "tensor_of",
]

CACHE_BYTES = 2 << 30
"""Row groups kept in memory by a reader."""
SMALL_COLUMNS = ["prompt", "target", "chosen", "rejected", "latent_shape"]


class RowGroups:
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
                table = open_file(file).read_row_group(group, columns=self.columns).combine_chunks()
                while self.tables and sum(t.nbytes for t in self.tables.values()) > self.cache_bytes:
                    self.tables.popitem(last=False)
                self.tables[key] = table
            self.tables.move_to_end(key)
            return self.tables[key]


def open_file(file: Path) -> Any:
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
    metadata = open_file(file).schema_arrow.metadata
    return json.loads(metadata[b"rejects"]), int(metadata[b"num_items"])


def shard_pictures(file: Path) -> dict[str, str | None]:
    """Digests of the picture files behind a shard, see `write_pairs`."""
    return json.loads(open_file(file).schema_arrow.metadata.get(b"pictures", b"{}"))


def shard_prompts(file: Path) -> list[str]:
    """Distinct prompts of a shard, in order of appearance."""
    column = open_file(file).read(columns=["prompt"]).column("prompt")
    return list(dict.fromkeys(column.to_pylist()))


def halves(content: Any) -> Tensor:
    """float16 numbers of a buffer, without a copy: valid as long as its table is."""
    import pyarrow as pa

    return torch.from_dlpack(pa.Array.from_buffers(pa.float16(), content.size // 2, [None, content]))


def tensor_of(content: Any, dtype: np.dtype, shape: Sequence[int]) -> Tensor:
    """A copy, since the buffer belongs to the cache."""
    return torch.from_numpy(np.frombuffer(content, dtype=dtype).reshape(shape).astype(np.float32))


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


class Columns:
    """The small columns of all shards, gathered."""

    def __init__(self) -> None:
        self.places: list[tuple[Path, int]] = []
        self.shapes: dict[tuple[int, ...], int] = {}
        self.prompts: dict[str, int] = {}
        self.images: dict[tuple[str, int], int] = {}
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, file: Path) -> None:
        opened = open_file(file)
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
