"""A whole preparation: counts, interruptions, sources that change."""

import errno
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_lrm.build.pairs import pair_encoder
from dina_lrm.cli import main as cli
from dina_lrm.data.prepare import run as preparing
from dina_lrm.data.prepare.shard import prompt_rows
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.shards.write import FORMAT, PromptRow
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import ColourEncoder, rows_of
from tests.unit.data.prepare.files import digests, hpdv3, run, save


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
    with pytest.raises(InvalidInputError, match="not finished"):
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
    with pytest.raises(InvalidInputError, match=f"{name} {told} .*latents.* another"):
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
    with pytest.raises(InvalidInputError, match=f"{name} changed .*latents.* put back"):
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
    with pytest.raises(OSError, match="make room"):
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


def test_load_encoder_can_be_sent_to_a_process() -> None:
    import pickle

    pickle.dumps(partial(pair_encoder, pipeline="bundled", max_pixels=None, max_text_tokens=None))
