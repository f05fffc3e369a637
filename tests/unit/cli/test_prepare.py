"""`dina-lrm prepare` as a command: a split into two folders, and what an interruption says and leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from dina_lrm.cli.main import EXIT_USAGE, main
from dina_lrm.cli.prepare import recipe_of
from dina_lrm.data.shards.read import LatentShards
from dina_lrm.data.split import fold_prompt
from tests.rows import write_json_lines
from tests.unit.data.layouts import encoded

WORDS = ("red circle", "blue square", "green triangle", "large circle", "small square", "gray background")


def write_rows(root: Path, num: int = 24) -> Path:
    """Pictures of two sizes, prompts that recur in another case, and five rows that give no pair."""
    root.mkdir()
    for index in range(2 * num):
        (root / f"{index}.png").write_bytes(encoded(index, (32, 32) if index % 3 else (48, 32)))
    rows: list[Any] = [
        {
            "prompt": f"a {WORDS[index % 6]}{'.' if index % 2 else ''} {WORDS[index // 6]}",
            "chosen": f"{2 * index}.png",
            "rejected": f"{2 * index + 1}.png",
        }
        for index in range(num)
    ]
    rows[3]["rejected"] = "0.png"
    rows[4] |= {"votes_chosen": 2, "votes_rejected": 2}
    rows[5]["chosen"] = "gone.png"
    rows[6]["rejected"] = rows[6]["chosen"]
    (root / "14.png").write_bytes(b"no picture")
    rows[8]["prompt"] = ""
    file = root / "rows.jsonl"
    write_json_lines(file, rows)
    return file


def command(file: Path, output: Path, *more: str) -> list[str]:
    given = ["prepare", "jsonl", "--root", str(file), "--output", str(output), "--device", "cpu"]
    return [*given, "--processes", "1", "--pairs-per-shard", "4", *more]


def rows_of(folder: Path, *columns: str) -> list[dict[str, Any]]:
    files = sorted((folder / "pairs").glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file, columns=list(columns)).to_pylist()]


def digests(output: Path) -> dict[str, dict[str, str]]:
    return {
        part: json.loads((output / part / "manifest.json").read_text())["digests"]
        for part in ("train", "test")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The rows and the folder of a split."""
    folder = tmp_path_factory.mktemp("split")
    file = write_rows(folder / "mine")
    assert main(command(file, folder / "latents", "--test-fraction", "0.2", "--json")) == 0
    return file, folder / "latents"


@pytest.mark.long
def test_two_folders_account_for_the_source(prepared: tuple[Path, Path]) -> None:
    _, output = prepared
    parts = {
        part: rows_of(output / part, "row", "prompt", "chosen", "rejected") for part in ("train", "test")
    }
    rejects = {
        part: [json.loads(line) for line in (output / part / "rejects.jsonl").read_text().splitlines()]
        for part in parts
    }
    rows = [row["row"] for part in parts.values() for row in part]
    rows += [reject["row"] for part in rejects.values() for reject in part]
    assert sorted(rows) == list(range(24))
    assert {reject["row"] for part in rejects.values() for reject in part} == {4, 5, 6, 7, 8}
    assert all(reject["line"] == reject["row"] + 1 for part in rejects.values() for reject in part)
    assert 3 <= len(parts["test"]) <= 4  # a fifth of the 20 that are not known to be unusable
    prompts = [{fold_prompt(row["prompt"]) for row in part} for part in parts.values()]
    pictures = [{row[side] for row in part for side in ("chosen", "rejected")} for part in parts.values()]
    assert not prompts[0] & prompts[1]
    assert not pictures[0] & pictures[1]
    for part in parts:
        assert len(LatentShards.open(output / part)) == len(parts[part])


@pytest.mark.long
def test_the_split_is_one_with_its_folder(
    prepared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = prepared
    for options, told in (
        (["--test-fraction", "0.3"], "part was .* and is"),
        (["--test-fraction", "0.2", "--seed", "1"], "part was .* and is"),
        ([], "holds latents with a split"),
        (["--test-fraction", "0"], "must be between 0 and 1"),
    ):
        assert main(command(file, output, *options)) == 2
        assert re.search(told, capsys.readouterr().err)
    assert main(["prepare", "pickapic", "--test-fraction", "0.2", "--output", str(output)]) == 2
    assert "--root" in capsys.readouterr().err


@pytest.mark.long
def test_the_summary_adds_up_and_names_what_comes_next(
    prepared: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = prepared
    before = digests(output)
    assert main(command(file, output, "--test-fraction", "0.2")) == 0  # everything is there
    told = capsys.readouterr().err
    found = re.search(r"24 comparisons: (\d+) for train \+ (\d+) for test \+ 5 rejected", told)
    assert found is not None
    assert sum(map(int, found.groups())) == 19
    assert f"next: dina-lrm train bundled --data.train {output / 'train'} --output RUN" in told
    assert f"then: dina-lrm evaluate --model RUN --pairs {output / 'test'}" in told
    assert digests(output) == before


def test_the_recipe_of_a_generator_is_named(tiny_pipeline: Path) -> None:
    assert recipe_of("bundled") == "bundled"
    assert recipe_of(str(tiny_pipeline)) == f"RECIPE --model.pipeline {tiny_pipeline}"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_says_how_to_go_on_and_ends_in_the_same_bytes(
    prepared: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    """Signals come when the first part is there and a process is at work on the second."""
    file, whole = prepared
    output = tmp_path / "latents"
    arguments = command(file, output, "--test-fraction", "0.2", "--pairs-per-shard", "4")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "dina_lrm", *arguments]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=environment) as process:
        limit = time.monotonic() + 300
        while not (output / "train/pairs/part-00000.parquet").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.02)
        workers = children(process.pid)
        assert workers
        process.send_signal(number)
        before = time.monotonic()
        process.wait(timeout=60)
        seconds = time.monotonic() - before
        assert process.stderr is not None
        told = process.stderr.read()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "what was finished is kept: run the same command again" in told
        assert "Traceback" not in told
        idle = os.getloadavg()[0] < os.cpu_count()  # type: ignore[operator]
        assert seconds < (2 if idle else 20)
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit, "a process goes on"
        time.sleep(0.1)
    assert not (output / "train" / "manifest.json").exists()
    assert main(arguments) == 0
    assert digests(output) == digests(whole)
    for part in ("train", "test"):
        assert (output / part / "rejects.jsonl").read_bytes() == (whole / part / "rejects.jsonl").read_bytes()


def children(parent: int) -> list[int]:
    """Processes of a process, those of the interpreter's own bookkeeping aside."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent and b"spawn_main" in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
            except OSError:
                continue
    return found


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "holiday.jpg").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}')
    assert main(command(tmp_path / "rows.jsonl", tmp_path / "pictures")) == EXIT_USAGE
    assert "holds 'holiday.jpg' and nothing of `dina-lrm prepare`" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "pictures").iterdir() if file.name != ".lock"] == [
        "holiday.jpg"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "--seed goes with --test-fraction"),
        (["--seed", "-1", "--test-fraction", "0.2"], "--seed is at least 0; got -1"),
        (["--split", "train"], "jsonl has no splits; got 'train'"),
    ],
)
def test_options_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}')
    assert main(command(tmp_path / "rows.jsonl", tmp_path / "latents", *flags)) == EXIT_USAGE
    assert message in capsys.readouterr().err
