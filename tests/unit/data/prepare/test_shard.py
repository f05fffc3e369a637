"""One shard: every item is a row or a reject."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject, StoredLatent
from dina_lrm.data.sources.registry import read_source, source_length
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import ColourEncoder, rows_of, shard
from tests.unit.data.prepare.files import cache, comparison, save


def test_every_item_is_a_row_or_a_reject(tmp_path: Path) -> None:
    small, a, b = (save(tmp_path / f"{n}.png", (s, s), n) for n, s in ((0, 8), (1, 32), (2, 32)))
    items = [
        comparison(a, b, 0, votes_chosen=3, votes_rejected=1),
        Reject(row=1, reason="no prompt: None"),
        comparison(small, a, 2),
        comparison(a, tmp_path / "gone.png", 3),
        comparison(a, b"nothing", 4),
        comparison(a, b, 5, tie=True),
        comparison(a, b, 6, confidence=0.5),
        comparison(b, a.read_bytes(), 7, confidence=0.99),
    ]
    rejects = shard(items, tmp_path / "shard.parquet", min_confidence=0.95)
    assert [(reject.row, reject.reason.split(":")[0]) for reject in rejects] == [
        (1, "no prompt"),
        (2, "size"),
        (3, "missing file"),
        (4, "unreadable image"),
        (5, "tie"),
        (6, "confidence"),
    ]
    assert "gone.png" in rejects[2].reason
    assert all(reject.line is None for reject in rejects)
    assert str(tmp_path) not in json.dumps([reject.reason for reject in rejects])  # names, from the root
    rows = rows_of(tmp_path / "shard.parquet")
    assert [(row["row"], row["target"]) for row in rows] == [(0, 0.75), (7, 1.0)]
    assert rows[0]["chosen"] == "1.png"
    assert rows[1]["rejected"].startswith("sha256:")


def test_latents_are_float16_bytes_of_the_stated_shape(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", (48, 32), 1), save(tmp_path / "b.png", (48, 32), 2)
    shard([comparison(a, b)], tmp_path / "shard.parquet")
    (row,) = rows_of(tmp_path / "shard.parquet")
    latent = np.frombuffer(row["latents_chosen"], np.float16).reshape(row["latent_shape"])
    pixels = torch.from_numpy(np.array(Image.open(a))).permute(2, 0, 1).float() / 255
    assert latent.shape == (3, 4, 6)
    assert np.array_equal(latent, torch.nn.functional.avg_pool2d(pixels, 8).half().numpy())


def test_a_row_group_holds_one_shape(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    wide, copy = (save(tmp_path / f"{n}.png", (64, 32), n) for n in (1, 2))
    square, other = (save(tmp_path / f"{n}.png", (32, 32), n) for n in (3, 4))
    items = [comparison(wide, copy, n) if n % 3 else comparison(square, other, n) for n in range(15)]
    shard(items, tmp_path / "shard.parquet")
    opened = parquet.ParquetFile(tmp_path / "shard.parquet")
    groups = [opened.read_row_group(n).to_pylist() for n in range(opened.num_row_groups)]
    assert [len(group) for group in groups] == [4, 1, 4, 4, 2]
    assert all(len({tuple(row["latent_shape"]) for row in group}) == 1 for group in groups)


def test_mixed_sizes_are_padded_or_rejected(tmp_path: Path) -> None:
    square, wide = save(tmp_path / "s.png", (32, 32), 1), save(tmp_path / "w.png", (64, 32), 2)
    items = [comparison(square, wide), comparison(wide, square)]
    assert shard(items, tmp_path / "padded.parquet") == []
    first, second = rows_of(tmp_path / "padded.parquet")
    assert first["latent_shape"] == [3, 4, 4]
    assert first["latents_rejected"] == second["latents_chosen"]
    rejects = shard(items, tmp_path / "rejected.parquet", mixed_sizes="reject")
    assert [reject.reason for reject in rejects] == [
        "aspect ratios differ: 32x32 and 64x32",
        "aspect ratios differ: 64x32 and 32x32",
    ]


def test_ties_may_be_kept_as_one_half(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png", seed=1), save(tmp_path / "b.png", seed=2)
    assert shard([comparison(a, b, tie=True)], tmp_path / "shard.parquet", ties="half") == []
    assert rows_of(tmp_path / "shard.parquet")[0]["target"] == 0.5


def test_a_latent_that_is_not_finite_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = save(tmp_path / "a.png", seed=1), save(tmp_path / "b.png", seed=2)
    monkeypatch.setattr(
        ColourEncoder, "encode_images", lambda *_: [torch.full((3, 4, 4), 1e6), torch.zeros(3, 4, 4)]
    )
    (reject,) = shard([comparison(a, b)], tmp_path / "shard.parquet")
    assert reject.reason == "latent is not finite: a.png"


def test_a_part_without_a_usable_pair_is_a_shard_without_rows(tmp_path: Path) -> None:
    rejects = shard([Reject(row=0, reason="no prompt: ''")] * 3, tmp_path / "shard.parquet")
    assert len(rejects) == 3
    assert rows_of(tmp_path / "shard.parquet") == []


def test_the_same_picture_on_both_sides_is_a_reject(tmp_path: Path) -> None:
    """Files of the same content under two names, a file and its bytes; another of that size is fine."""
    a, other = save(tmp_path / "a.png", seed=1), save(tmp_path / "b.png", seed=2)
    copy = tmp_path / "copy.png"
    copy.write_bytes(a.read_bytes())
    items = [comparison(a, copy, 0), comparison(a.read_bytes(), copy, 1), comparison(a, other, 2)]
    rejects = shard(items, tmp_path / "shard.parquet")
    assert [(reject.row, reject.reason.split(",")[0]) for reject in rejects] == [
        (0, "same picture: on both sides"),
        (1, "same picture: on both sides"),
    ]


def test_what_is_no_file_is_a_reject(tmp_path: Path) -> None:
    import os

    a = save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    names = ("pipe", "device", "folder")
    items = [comparison(a, tmp_path / f"{name}.png", row) for row, name in enumerate(names)]
    assert [reject.reason for reject in shard(items, tmp_path / "shard.parquet")] == [
        "no file: pipe.png is a FIFO",
        "no file: device.png is a device",
        "no file: folder.png is a folder",
    ]


def test_the_latent_cache_is_a_source(tmp_path: Path) -> None:
    items = list(read_source("latent-cache", cache(tmp_path, index=False), check_images="none"))
    assert source_length("latent-cache", tmp_path) == len(items) == 4
    first = items[0]
    assert isinstance(first, Comparison)
    assert (first.pair.target, first.confidence, first.generators) == (0.75, 0.98, ("flux", "sdxl"))
    rejects = shard(items, tmp_path / "shard.parquet")
    assert [(reject.row, reject.reason.split(":")[0]) for reject in rejects] == [
        (2, "latents differ in shape"),
        (3, "unreadable latent"),
    ]
    rows = rows_of(tmp_path / "shard.parquet")
    stored = np.frombuffer(rows[0]["latents_chosen"], np.float16).reshape(16, 4, 6)
    assert isinstance(first.pair.chosen, StoredLatent)
    assert np.array_equal(stored, first.pair.chosen.array().astype(np.float16))
    assert rows[0]["chosen"] == "images/0a.jpg"


def test_rows_that_the_cache_does_not_index_are_told(tmp_path: Path) -> None:
    items = list(read_source("latent-cache", cache(tmp_path, index=True)))
    assert [isinstance(item, Reject) for item in items] == [False, True, False, True]
    assert [item.reason.split(":")[0] for item in items if isinstance(item, Reject)] == [
        "not in the index of the cache",
        "unreadable latent",
    ]
    (tmp_path / "index.csv").write_text("global_id,parquet_path,row_group,row_index\n0,x.parquet,0,0")
    with pytest.raises(InvalidInputError, match=r"names x\.parquet, which is not in"):
        list(read_source("latent-cache", tmp_path))
