"""Small pictures, lists and tables as published sets have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dina_lrm.data.comparisons import Check, Comparison
from dina_lrm.data.pairs import Reject
from dina_lrm.data.sources.registry import read_source
from tests import pictures


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Smooth, so that a perceptual hash means something."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, form: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    return pictures.encoded(picture(seed, size), form)


def write(root: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(file)


def dump(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def table(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def read(
    name: str, root: Path, split: str | None = None, check: Check = "exists"
) -> tuple[list[Comparison], list[Reject]]:
    items = list(read_source(name, root, split=split, check_images=check))
    return [i for i in items if isinstance(i, Comparison)], [i for i in items if isinstance(i, Reject)]


SIDES = {"chosen": "a.png", "rejected": "b.png"}


def rows_file(root: Path, rows: list[Any]) -> Path:
    file = root / "rows.jsonl"
    file.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file
