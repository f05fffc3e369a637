"""`score` and `compare` around a model that is known: parsing, output, files of rows, resuming, rejects."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dina_lrm.cli.main import main
from dina_lrm.errors import InvalidInputError
from tests.pictures import encoded, write_grays
from tests.rows import write_json_lines
from tests.unit.cli.fakes import use_brightness_model


@pytest.fixture
def pictures(tmp_path):
    """Gray pictures of brightness 0, 0.2, 0.4, 0.6, 0.8."""
    return write_grays(tmp_path, 5, prefix="gray")


def noisy_png():
    """A picture of some size in bytes, whose header survives a cut."""
    image = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32))
    return encoded(image)


# --- images on the command line ----------------------------------------------------------------------------


def test_table_ranks_in_the_order_given(pictures, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(pictures[0].parent)
    assert main(["score", "gray", "gray1.png", "gray4.png", "gray2.png"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
    assert [(row[-2], row[-1]) for row in rows] == [("+0.200", "3"), ("+0.800", "1"), ("+0.400", "2")]


def test_json_is_one_object_a_line(pictures, monkeypatch, capsys):
    model = use_brightness_model(monkeypatch)
    arguments = ["--noise-levels", "0.2,0.5", "--seed", "7", "--batch-size", "2", "--json"]
    assert main(["score", "gray", *map(str, pictures[:3]), *arguments]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["score"] for record in records] == pytest.approx([0.0, 0.2, 0.4], abs=1e-6)
    assert records[0]["noise_levels"] == [0.2, 0.5]
    assert records[0]["standard_error"] is None
    assert [len(call["prompts"]) for call in model.calls] == [2, 1]
    assert {call["seed"] for call in model.calls} == {7}


def test_draws_give_standard_errors(pictures, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    assert main(["score", "gray", str(pictures[0]), "--num-draws", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["standard_error"] == pytest.approx(0.01)


def test_one_level_is_a_number_and_several_are_an_ensemble(pictures, monkeypatch):
    model = use_brightness_model(monkeypatch, noise_levels=(0.3,))
    main(["score", "gray", str(pictures[0])])
    main(["score", "gray", str(pictures[0]), "--noise-levels", "0.2,0.5"])
    assert [call["noise_levels"] for call in model.calls] == [0.3, [0.2, 0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gray"], "give a prompt and images"),
        (["", "gray0.png"], "give a prompt and images"),
        (["gray", "absent.png"], "absent.png"),
        (["gray", "notes.txt"], "notes.txt"),
        (["gray", "gray0.png", "--output", "x.parquet"], "--output goes with --input"),
        (["gray", "gray0.png", "--noise-levels", "1.2"], "got 1.2"),
        (["gray", "gray0.png", "--noise-levels", "nan"], "[0, 1]"),
        (["gray", "gray0.png", "--noise-levels", "low"], "separated by commas"),
        (["gray", "gray0.png", "--num-draws", "0"], "at least 1"),
        (["--input", "rows.jsonl"], "--output"),
        (["--input", "absent.jsonl", "--output", "x.parquet"], "absent.jsonl"),
        (["--input", "notes.txt", "--output", "x.parquet"], "'notes.txt' has .txt"),
        (["--input", "rows.jsnl", "--output", "x.parquet"], "did you mean rows.jsonl"),
        (["--input", "pipe.jsonl", "--output", "x.parquet"], "'pipe.jsonl' is a FIFO"),
        (["--input", "rows.jsonl", "--output", "x.txt"], "got 'x.txt'"),
        (["--input", "rows.jsonl", "--output", "pipe.jsonl", "--overwrite"], "'pipe.jsonl' is a FIFO"),
        (["--input", "rows.jsonl", "--output", "notes.txt/x.jsonl"], "Not a directory"),
        (["gray", "pipe.png"], "pipe.png is a FIFO"),
        (["gray", "/dev/zero"], "/dev/zero is a device"),
        (["gray", "."], ". is a folder"),
        (["gray", "gray0.png", "--target-error", "0.1", "--num-draws", "1"], "exclude each other"),
        (["gray", "gray0.png", "--target-error", "0"], "above 0"),
        (["gray", "gray0.png", "--max-draws", "8"], "--max-draws goes with --target-error"),
        (["gray", "gray0.png", "--rows_per_part=8"], "--rows-per-part goes with --input"),
        (["--input", "rows.jsonl", "--output", "x.jsonl", "--skip-bad"], "--skip-bad is for images"),
        (
            ["gray0.png"],
            "the prompt comes first, and 'gray0.png' is a file; as in: dina-lrm score \"PROMPT\"",
        ),
        (["gray0.png", "gray1.png"], '"PROMPT" gray0.png gray1.png'),
        (["a cut emoji \ud83d", "gray0.png"], "the prompt is not text: its character 12 is '\\ud83d'"),
        (["gray", "--input", "rows.jsonl", "--output", "x.parquet"], "leave out"),
    ],
)
def test_mistakes_are_named(arguments, message, pictures, tmp_path, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    (tmp_path / "notes.txt").write_text("no picture\n")
    for name in ("pipe.png", "pipe.jsonl"):
        os.mkfifo(tmp_path / name)
    write_json_lines(tmp_path / "rows.jsonl", [{"prompt": "gray", "image": "gray1.png"}])
    monkeypatch.chdir(tmp_path)
    assert main(["score", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert captured.out == ""
    assert "Traceback" not in captured.err


# --- a file of rows ----------------------------------------------------------------------------------------


BAD_ROWS = [
    {"prompt": "gray", "image": "absent.png"},
    {"prompt": " ", "image": "gray1.png"},
    {"prompt": "gray"},
    {"image": "gray1.png"},
    {"prompt": "a forbidden word", "image": "gray1.png"},
    {"prompt": 3, "image": "gray1.png"},
    "{not json",
    "[1, 2]",
]


def test_every_row_is_accounted_for(pictures, tmp_path, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    good = [{"prompt": "gray", "image": path.name} for path in pictures]
    rows = write_json_lines(tmp_path / "rows.jsonl", [*good[:2], *BAD_ROWS, *good[2:]])
    output = tmp_path / "scores.parquet"
    assert main(["score", "--input", str(rows), "--output", str(output), "--json", "--batch-size", "4"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["scored"], summary["rejected"]) == (13, 5, 8)

    table = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["row"] for row in table] == list(range(13))
    assert [row["score"] for row in table if row["error"] is None] == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-6
    )
    rejects = [json.loads(line) for line in Path(summary["rejects"]).read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(2, 10))
    reasons = [
        "missing file",
        "empty",
        "image is missing",
        "prompt is missing",
        "not allowed",
        "type int",
        "JSON",
        "object",
    ]
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject["error"]
    assert output.with_name("scores.parquet.parts").is_dir()  # for --retry-rejects


def test_images_inside_parquet(tmp_path, monkeypatch):
    use_brightness_model(monkeypatch)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).save(buffer, format="PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": b"torn", "path": None}]
    table = pyarrow.table({"prompt": ["white", "white"], "image": cells})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    output = tmp_path / "scores.jsonl"
    assert main(["score", "--input", str(tmp_path / "rows.parquet"), "--output", str(output)]) == 0
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert first["score"] == pytest.approx(1.0)
    assert second["score"] is None
    assert "4 bytes" in second["error"]


def test_an_interrupted_run_continues(pictures, tmp_path, monkeypatch, capsys):
    model = use_brightness_model(monkeypatch)
    rows = write_json_lines(
        tmp_path / "rows.jsonl", [{"prompt": "gray", "image": path.name} for path in pictures]
    )
    output = tmp_path / "scores.parquet"
    arguments = ["score", "--input", str(rows), "--output", str(output)]
    arguments += ["--batch-size", "1", "--rows-per-part", "2"]

    healthy = model.score

    def stop_at_the_fourth(*args, **settings):
        if len(model.calls) == 3:
            raise KeyboardInterrupt
        return healthy(*args, **settings)

    model.score = stop_at_the_fourth
    assert main(arguments) == 130
    assert "interrupted; what was done is kept: give the same command again" in capsys.readouterr().err
    assert not output.exists()
    model.score = healthy
    model.calls.clear()
    assert main([*arguments, "--seed", "1"]) == 2  # other settings must not be mixed into it
    assert "another seed" in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(model.calls) == 3  # rows 2, 3 and 4: the first part was complete
    assert "continuing after 2 of 5 rows" in capsys.readouterr().err
    scores = pyarrow.parquet.read_table(output)["score"].to_pylist()
    assert scores == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-6)


def test_a_finished_output_is_not_overwritten_unasked(pictures, tmp_path, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    rows = write_json_lines(tmp_path / "rows.jsonl", [{"prompt": "gray", "image": pictures[0].name}])
    arguments = ["score", "--input", str(rows), "--output", str(tmp_path / "scores.jsonl")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_nothing_scored_is_an_error(tmp_path, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    rows = write_json_lines(tmp_path / "rows.jsonl", BAD_ROWS[:2])
    assert main(["score", "--input", str(rows), "--output", str(tmp_path / "scores.jsonl")]) == 2
    assert "no row" in capsys.readouterr().err


# --- names and dashes --------------------------------------------------------------------------------------


def test_what_stands_behind_two_dashes_is_a_file(pictures, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(pictures[0].parent)
    shutil.copy("gray4.png", "-dash.png")
    for arguments in (["gray", "gray1.png", "--", "-dash.png"], ["--", "gray", "gray1.png", "-dash.png"]):
        assert main(["score", "--json", *arguments]) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(one["image"], round(one["score"], 3)) for one in records] == [
            ("gray1.png", 0.2),
            ("-dash.png", 0.8),
        ]
    assert main(["score", "--json", "--", "-a prompt", "-dash.png"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "-a prompt"


def test_names_are_printed_as_typed(pictures, monkeypatch, capsys):
    """Also long ones, and ones that are not UTF-8."""
    use_brightness_model(monkeypatch)
    folder = pictures[0].parent / "a folder with a long name" / "and another one"
    folder.mkdir(parents=True)
    odd = os.fsdecode(b"gr\xe4y.png")
    shutil.copy(pictures[0], folder / "gray0.png")
    shutil.copy(pictures[0], folder / odd)
    monkeypatch.chdir(pictures[0].parent)
    names = [f"./{folder.relative_to(pictures[0].parent)}//gray0.png", f"{folder}/{odd}"]
    assert main(["score", "gray", names[0]]) == 0
    assert names[0] in capsys.readouterr().out
    assert main(["score", "gray", *names, "--json"]) == 0
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == names


def test_bad_pictures_are_skipped_when_asked(pictures, monkeypatch, capsys):
    """A missing one, one that is cut off, one that the model refuses."""
    model = use_brightness_model(monkeypatch)
    monkeypatch.chdir(pictures[0].parent)
    Path("cut.png").write_bytes(noisy_png()[:600])
    Image.new("RGB", (1, 1)).save("small.png")
    healthy = model.score

    def refuse_small(prompts, images, **settings):
        if any(image.size == (1, 1) for image in images):
            raise InvalidInputError("image 0 of 1x1 pixels is too small")
        return healthy(prompts, images, **settings)

    model.score = refuse_small
    names = ["gray0.png", "absent.png", "cut.png", "small.png", "gray2.png"]
    assert main(["score", "gray", *names]) == 2
    captured = capsys.readouterr()
    assert "missing file: absent.png (--skip-bad leaves such pictures out)" in captured.err
    assert main(["score", "gray", *names[2:]]) == 2
    captured = capsys.readouterr()
    assert "cut.png" in captured.err
    assert "small.png: image 0 of 1x1" in captured.err
    assert captured.out == ""
    assert main(["score", "gray", *names, "--skip-bad", "--json"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["image"] for line in captured.out.splitlines()] == ["gray0.png", "gray2.png"]
    assert [line.split(" ")[0] for line in captured.err.splitlines()] == ["skipped:"] * 3
    assert main(["score", "gray", *names[1:4], "--skip-bad"]) == 2
    assert capsys.readouterr().err.count("error:") == 1
