"""From a data set to latent shards: every item is a row or a reject, and the bytes do not depend on luck."""

import errno
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dina_lrm.build.pairs import pair_encoder, prepare_source
from dina_lrm.cli import main as cli
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.latents import LatentPairs
from dina_lrm.data.pairs import PreferencePair, Reject, StoredLatent
from dina_lrm.data.prepare import run as preparing
from dina_lrm.data.prepare.shard import prompt_rows
from dina_lrm.data.shards.prompts import stack_prompts
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.shards.write import FORMAT, PromptRow
from dina_lrm.data.sources.registry import read_source, source_length
from dina_lrm.errors import InvalidInputError
from tests.tiny import PROMPT
from tests.unit.data.layouts import ColourEncoder, rows_of, shard

PROMPTS = ("a red circle", "a red square", "two blue circle")


def save(file: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """A picture of (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def hpdv3(root: Path, num: int = 11) -> Path:
    """Pictures of two sizes; rows with one missing, one cut off, one with NaN, and with an empty prompt."""
    for index in range(4):
        save(root / f"images/{index}.png", (32, 32) if index < 3 else (48, 32), seed=index)
    (root / "images/cut.png").write_bytes((root / "images/0.png").read_bytes()[:60])
    Image.fromarray(np.full((32, 32), np.nan, dtype=np.float32)).save(root / "images/nan.tiff")
    good = [
        {
            "prompt": PROMPTS[index % 3],
            "path1": f"images/{index % 4}.png",
            "path2": f"images/{(index + 1) % 4}.png",
        }
        for index in range(num)
    ]
    bad = [
        {"prompt": PROMPT, "path1": "images/gone.png", "path2": "images/1.png"},
        {"prompt": PROMPT, "path1": "images/cut.png", "path2": "images/1.png"},
        {"prompt": PROMPT, "path1": "images/0.png", "path2": "images/nan.tiff"},
        {"prompt": "", "path1": "images/0.png", "path2": "images/1.png"},
    ]
    rows = [*good[:5], *bad, *good[5:]]
    (root / "train.json").write_text(json.dumps(rows))
    return root


def comparison(chosen: Any, rejected: Any, row: int = 0, **about: Any) -> Comparison:
    names = ("votes_chosen", "votes_rejected", "tie")
    said = {name: about.pop(name) for name in names if name in about}
    pair = PreferencePair(prompt=about.pop("prompt", "a prompt"), chosen=chosen, rejected=rejected, **said)
    return Comparison(pair=pair, row=row, file="f", **about)


# --- one shard


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


# --- the latent cache of the paper's code


def latent_bytes(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).standard_normal(shape).astype(dtype))
    return buffer.getvalue()


def cache(root: Path, *, index: bool) -> Path:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [
        {
            "prompt": f"prompt {n}",
            "model1": "flux",
            "model2": "sdxl",
            "detailed_results": str({"votes_chosen": 9, "votes_rejected": 3, "confidence": 0.98}),
            "image1_path": f"images/{n}a.jpg",
            "image2_path": f"images/{n}b.jpg",
            "latent1": latent_bytes((16, 4, 6), 2 * n),
            "latent2": latent_bytes((16, 4, 6) if n != 2 else (16, 6, 4), 2 * n + 1),
        }
        for n in range(4)
    ]
    rows[3]["latent2"] = b"not an array"
    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), root / "part_rank00.parquet", compression="zstd", row_group_size=2
    )
    if index:
        lines = ["global_id,parquet_path,row_group,row_index,width,height,bucket_id"]
        lines += [f"{n},/old/place/part_rank00.parquet,{n // 2},{n % 2},48,32,0" for n in (0, 2, 3)]
        (root / "index.csv").write_text("\n".join(lines))
    return root


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


# --- a folder


@pytest.fixture(scope="module")
def prepared(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Root, shards and counts of a run with two processes."""
    root = hpdv3(tmp_path_factory.mktemp("hpdv3"))
    output = root / "latents"
    counts = run(root, output, tiny_pipeline, processes=2)
    return root, output, counts


def run(root: Path, output: Path, pipeline: Path, *, processes: int = 1, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"pairs_per_shard": 4, "pairs_per_row_group": 2, "split": "train"}
    return prepare_source(
        "hpdv3", root, output, pipeline=str(pipeline), devices=["cpu"] * processes, **defaults | settings
    )


def test_counts_add_up(prepared: tuple[Path, Path, Any]) -> None:
    _, output, counts = prepared
    assert (counts.num_items, counts.num_pairs, counts.num_prompts) == (15, 11, 3)
    assert counts.rejects == {"unreadable image": 2, "missing file": 1, "no prompt": 1}
    rejects = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [5, 6, 7, 8]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    assert manifest["counts"]["num_pairs"] == 11
    assert "11 preference pairs of 3 prompts" in (output / "README.md").read_text()


def test_latents_and_embeddings_are_those_of_scoring(
    prepared: tuple[Path, Path, Any], tiny_pipeline: Path
) -> None:
    root, output, _ = prepared
    shards = LatentShards.open(output)
    encoder = pair_encoder("cpu", pipeline=str(tiny_pipeline), max_pixels=None, max_text_tokens=None)
    batch = shards.batch([0, 1]).to("cpu")
    cpu = torch.device("cpu")
    for side, latents in (("chosen", batch.latents_chosen), ("rejected", batch.latents_rejected)):
        names = [row[side] for row in rows_of(output / "pairs/part-00000.parquet")[:2]]
        expected = encoder.encode_images([root / name for name in names], cpu)
        # the VAE sees other pictures beside these, which may move the last bit
        torch.testing.assert_close(latents, torch.stack(expected).half().float(), rtol=2e-3, atol=2e-3)
    texts = [shards.prompts[index] for index in shards.prompt_index[:2].tolist()]
    conditioning = encoder.encode_prompts(texts, cpu)
    torch.testing.assert_close(
        batch.prompt_embeds, conditioning.prompt_embeds.half().float(), rtol=2e-3, atol=2e-3
    )
    assert batch.pooled_prompt_embeds is not None


def digests(output: Path) -> dict[str, str]:
    return json.loads((output / "manifest.json").read_text())["digests"]


@pytest.mark.long
def test_bytes_do_not_depend_on_processes_or_interruptions(
    prepared: tuple[Path, Path, Any], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """What a killed run leaves: some files whole, one half written, no manifest."""
    root, output, _ = prepared
    again = tmp_path / "again"
    with pytest.raises(RuntimeError, match="stop"):
        prepare_with_stop(root, again, tiny_pipeline)
    assert 0 < len(list((again / "pairs").glob("*.parquet"))) < 4
    (again / "pairs" / "part-00003.parquet.1.partial").write_bytes(b"half")
    with pytest.raises(InvalidInputError, match="was not finished: run it again"):
        LatentShards.open(again)
    progress: list[tuple[str, int, int]] = []
    run(root, again, tiny_pipeline, on_progress=lambda *args: progress.append(args))
    assert digests(again) == digests(output)
    assert not list(again.rglob("*.partial"))
    assert next(found for kind, _, found in progress if kind == "pairs") > 0
    assert (again / "rejects.jsonl").read_bytes() == (output / "rejects.jsonl").read_bytes()


def prepare_with_stop(root: Path, output: Path, pipeline: Path, *, after: int = 4) -> None:
    def stop(kind: str, done: int, found: int) -> None:
        if kind == "pairs" and done >= after:
            raise RuntimeError("stop")

    run(root, output, pipeline, on_progress=stop)


def test_a_folder_belongs_to_one_set_of_settings(
    prepared: tuple[Path, Path, Any], tiny_pipeline: Path
) -> None:
    root, output, _ = prepared
    with pytest.raises(InvalidInputError, match="max_pixels was 1048576 and is 1024"):
        run(root, output, tiny_pipeline, max_pixels=1024)
    with pytest.raises(InvalidInputError, match="max_pixels = 0: must be at least 1"):
        run(root, root / "other", tiny_pipeline, max_pixels=0)


@pytest.mark.parametrize("change", ["swapped", "gone", "new"])
def test_a_source_that_changed_is_refused_by_name(
    prepared: tuple[Path, Path, Any], tiny_pipeline: Path, tmp_path: Path, change: str
) -> None:
    """Sides exchanged in all rows: as many bytes as before."""
    import shutil

    root = Path(shutil.copytree(prepared[0], tmp_path / "root"))
    file = root / "train.json"
    file.write_text(
        file.read_text().replace("path1", "path0").replace("path2", "path1").replace("path0", "path2")
    )
    settings = json.loads((root / "latents/prepare.json").read_text())
    assert file.stat().st_size == (prepared[0] / "train.json").stat().st_size
    name, told = "train.json", "has changed"
    if change == "gone":
        settings["files"]["other.json"], name, told = "0", "other.json", "is gone"
    if change == "new":
        settings["files"], told = {}, "is new"
    (root / "latents/prepare.json").write_text(json.dumps(settings))
    with pytest.raises(
        InvalidInputError, match=rf"{name} {told} since .*latents was begun: prepare into another"
    ):
        run(root, root / "latents", tiny_pipeline)


@pytest.mark.long
@pytest.mark.parametrize("change", ["replaced", "supplied", "removed"])
def test_a_picture_that_changed_is_refused_by_name(tiny_pipeline: Path, tmp_path: Path, change: str) -> None:
    """Between a stop and the next run; of the same size and of the same age."""
    import os

    root = hpdv3(tmp_path / "root")
    with pytest.raises(RuntimeError, match="stop"):
        prepare_with_stop(root, root / "latents", tiny_pipeline)
    name = {"replaced": "images/2.png", "supplied": "images/gone.png", "removed": "images/2.png"}[change]
    file = root / name
    match change:
        case "replaced":
            ages = file.stat().st_atime_ns, file.stat().st_mtime_ns
            size = file.stat().st_size
            content = bytearray(file.read_bytes())
            content[-20] ^= 1
            file.write_bytes(content)
            os.utime(file, ns=ages)
            assert file.stat().st_size == size
        case "supplied":
            with pytest.raises(RuntimeError, match="stop"):
                prepare_with_stop(root, root / "latents", tiny_pipeline, after=8)
            save(file)
        case _:
            file.unlink()
    with pytest.raises(InvalidInputError, match=rf"{name} changed since .*latents was begun: put back"):
        run(root, root / "latents", tiny_pipeline)


@pytest.mark.long
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", r"no pair to prepare: jsonl \(rows.jsonl\) holds no rows"),
        (
            '{"prompt": "p"}\n\nno row\n',
            "none of 2 comparisons can be used: 1 needs chosen and rejected, or images and",
        ),
    ],
)
def test_a_source_without_a_pair_is_an_error(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, told: str
) -> None:
    """And its folder can be used again."""
    import re

    file, output = tmp_path / "rows.jsonl", tmp_path / "latents"
    file.write_text(rows)
    command = ["prepare", "jsonl", "--root", str(file), "--pipeline", str(tiny_pipeline), "--processes", "1"]
    command += ["--output", str(output), "--device", "cpu"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert "next" not in error
    assert not (output / "prepare.json").exists()
    assert (output / "rejects.jsonl").exists() == bool(rows)


def test_two_runs_do_not_share_a_folder(prepared: tuple[Path, Path, Any], tiny_pipeline: Path) -> None:
    import filelock

    root, output, _ = prepared
    with (
        filelock.FileLock(output / ".lock"),
        pytest.raises(InvalidInputError, match="another process is preparing"),
    ):
        run(root, output, tiny_pipeline)


def test_a_full_disk_is_told_and_loses_nothing(
    prepared: tuple[Path, Path, Any], tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, output, _ = prepared

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing, "write_rejects", full)
    with pytest.raises(OSError, match="make room and run the same command again"):
        run(root, output, tiny_pipeline)
    assert digests(output)


def test_a_pipeline_without_vae_is_refused_before_anything_is_written(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    root = hpdv3(tmp_path)
    with pytest.raises(ValueError, match="no vae"):
        run(root, tmp_path / "latents", tiny_backbone)
    assert not (tmp_path / "latents").exists()


@pytest.mark.long
def test_prompts_can_be_left_to_training(tiny_pipeline: Path, tmp_path: Path) -> None:
    root = hpdv3(tmp_path)
    counts = run(root, tmp_path / "latents", tiny_pipeline, embeddings=False, pairs_per_shard=100)
    assert counts.num_prompts == 3
    with pytest.raises(InvalidInputError, match="without embeddings"):
        LatentShards.open(tmp_path / "latents")
    encoder = ColourEncoder()

    def encode(prompts: Sequence[str]) -> list[PromptRow]:
        return prompt_rows(encoder.encode_prompts(prompts, torch.device("cpu")))

    batch = LatentShards.open(tmp_path / "latents", encode=encode).batch([0, 1, 2])
    assert batch.prompt_embeds[:, 0, 0].tolist() == [12.0, 12.0, 15.0]


def test_datasets_reads_the_folder(
    prepared: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    _, output, _ = prepared
    pairs = datasets.load_dataset(str(output), "pairs", split="train", streaming=True)
    rows = list(pairs)
    assert len(rows) == 11
    assert np.frombuffer(rows[0]["latents_chosen"], np.float16).reshape(rows[0]["latent_shape"]).ndim == 3
    assert len(list(datasets.load_dataset(str(output), "prompts", split="train", streaming=True))) == 3


@pytest.mark.long
def test_the_command(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dina_lrm.runs.pace.Pace.LEAST_SECONDS", 0)  # too short a work for a line otherwise
    root = hpdv3(tmp_path)
    command = ["prepare", "hpdv3", "--root", str(root), "--split", "train", "--pipeline", str(tiny_pipeline)]
    command += ["--output", str(tmp_path / "latents"), "--processes", "1", "--device", "cpu", "--json"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["num_pairs"] == 11
    assert "15 of 15 pairs" in told.err
    assert cli.main([*command[:2], "--root", str(tmp_path / "none"), "--output", "x"]) == 2
    assert "no folder of hpdv3: nothing at" in capsys.readouterr().err
    assert cli.main([*command, "--processes", "0"]) == 2


# --- reading


def test_batches_of_shards_have_one_shape_and_become_float32(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    assert len(shards) == 11
    assert len(shards.shapes) == 1
    for step in range(6):
        batch = shards.batch(shards.order(step, batch_size=4, seed=0)).to("cpu")
        assert batch.latents_chosen.shape == (4, *shards.shapes[0])
        assert batch.latents_chosen.dtype == batch.prompt_embeds.dtype == torch.float32


def test_a_small_cache_reads_the_same(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    large, small = LatentShards.open(output), LatentShards.open(output, cache_bytes=1)
    for indices in ([0, 7, 10], [3, 1]):
        assert torch.equal(large.batch(indices).latents_chosen, small.batch(indices).latents_chosen)
    assert len(small._read.tables) == 1


def test_pictures_of_one_draw_are_shared(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    draws = torch.zeros(11, dtype=torch.int64)
    shared = shards.batch(range(11), draws=draws)
    assert len(shared.distinct) < 22
    both = torch.cat([shared.latents_chosen, shared.latents_rejected])
    assert torch.equal(both[shared.distinct][shared.position], both)


def test_subset_and_fingerprint(prepared: tuple[Path, Path, Any]) -> None:
    _, output, _ = prepared
    shards = LatentShards.open(output)
    part = shards.subset([4, 2])
    assert torch.equal(part.batch([1]).latents_chosen, shards.batch([2]).latents_chosen)
    assert part.fingerprint() != shards.fingerprint() == LatentShards.open(output).fingerprint()


def test_prompts_of_different_length_need_a_mask() -> None:
    def row(length: int, mask: bool) -> PromptRow:
        own = torch.ones(length, dtype=torch.int64) if mask else None
        return PromptRow(prompt_embeds=torch.ones(length, 3), pooled_prompt_embeds=None, attention_mask=own)

    embeds, _, mask = stack_prompts([row(2, True), row(4, True)])
    assert embeds.shape == (2, 4, 3)
    assert mask is not None
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    with pytest.raises(InvalidInputError, match="need an attention mask"):
        stack_prompts([row(2, False), row(4, False)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "is missing or damaged"),
        ("remove", "lacks 1 of its files"),
        ("manifest", r"manifest\.json is damaged"),
        ("other", "holds 'something', not"),
        ("nothing", "holds no latent shards"),
        ("split", "was split .* evaluate on .*/test"),
    ],
)
def test_damage_is_told(damage: str, message: str, prepared: tuple[Path, Path, Any], tmp_path: Path) -> None:
    import shutil

    output = Path(shutil.copytree(prepared[1], tmp_path / "copy"))
    file = output / "pairs/part-00000.parquet"
    match damage:
        case "truncate":
            file.write_bytes(file.read_bytes()[:-100])
        case "remove":
            file.unlink()
        case "manifest":
            (output / "manifest.json").write_text("{")
        case "other":
            (output / "manifest.json").write_text('{"format": "something"}')
        case _:
            output.rename(tmp_path / ("test" if damage == "split" else "copy"))
            output = tmp_path
    with pytest.raises(InvalidInputError, match=message):
        LatentShards.open(output)


def test_embeddings_that_overflow_float16_are_an_error(tmp_path: Path) -> None:
    from dina_lrm.data.shards.write import write_prompts

    row = PromptRow(prompt_embeds=torch.full((2, 3), 1e6), pooled_prompt_embeds=None, attention_mask=None)
    with pytest.raises(InvalidInputError, match="'a prompt' is not finite in float16"):
        write_prompts(tmp_path / "p.parquet", ["a prompt"], [row], dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_load_encoder_can_be_sent_to_a_process() -> None:
    import pickle

    pickle.dumps(partial(pair_encoder, pipeline="bundled", max_pixels=None, max_text_tokens=None))


def test_latent_pairs_and_shards_are_one_kind_of_set() -> None:
    names = ("order", "parts", "batch", "subset", "fingerprint", "examples", "num_prompts")
    assert all(hasattr(kind, name) for kind in (LatentPairs, LatentShards) for name in names)


@pytest.mark.long
def test_a_set_on_the_hub_is_streamed(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: `datasets` streams a local folder of the same layout."""
    import pyarrow
    import pyarrow.parquet as parquet

    from dina_lrm.build import pairs as build
    from dina_lrm.data.sources.hub import read_hub

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = [{"bytes": save(tmp_path / f"{n}.png", seed=n).read_bytes(), "path": f"{n}.png"} for n in (0, 1)]
    row = {"prompt": "a red circle", "left_image": cells[0], "right_image": cells[1]}
    row |= {"left_model": "l", "right_model": "r"}
    rows = [row | {"vote_type": vote} for vote in ("leftvote", "rightvote", "tievote")]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / "test_v1-00000-of-00001.parquet")
    monkeypatch.setattr(build, "read_hub", partial(read_hub, dataset=str(tmp_path / "data")))
    counts = prepare_source("genai-bench", None, tmp_path / "latents", pipeline=str(tiny_pipeline))
    assert (counts.num_pairs, counts.rejects) == (2, {"tie": 1})
    first, second = rows_of(tmp_path / "latents/pairs/part-00000.parquet")
    assert first["latents_chosen"] == second["latents_rejected"]
    with pytest.raises(InvalidInputError, match="hpdv3 is not published as a table"):
        prepare_source("hpdv3", None, tmp_path / "other", pipeline=str(tiny_pipeline))
