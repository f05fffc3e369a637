"""`dina-lrm score` with a folder as output."""

import json

import pyarrow.parquet
import pytest

from dina_lrm.cli.main import main
from tests.pictures import write_grays
from tests.rows import write_json_lines
from tests.unit.cli.fakes import use_brightness_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """rows.jsonl with two gray pictures and one that is missing; the working directory."""
    write_grays(tmp_path, 2)
    rows = [{"prompt": "gray", "image": f"{number}.png", "id": number} for number in range(3)]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_in_a_folder(folder, capsys):
    arguments = ["score", "--input", "rows.jsonl", "--output", "out", "--rows-per-part", "2", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["rows"], summary["scored"]) == (3, 2)
    assert "1 rows could not be scored; the reasons are in out/rejects.jsonl" in captured.err
    tables = [pyarrow.parquet.read_table(folder / "out" / f"part-00000{n}.parquet") for n in range(2)]
    assert [table["id"].to_pylist() for table in tables] == [[0, 1], [2]]
    assert tables[0]["score"].to_pylist() == pytest.approx([0, 0.2])
    assert main(arguments) == 0
    assert "continuing after 3 of 3 rows" in capsys.readouterr().err


def test_a_run_without_a_score_has_failed(folder, capsys):
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "gray", "image": "absent.png"}) + "\n")
    assert main(["score", "--input", "rows.jsonl", "--output", "out/"]) == 2
    assert "no row of 'rows.jsonl' could be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out", "--rejects", "r.jsonl"], "a folder has its own"),
        (["--output", "out", "--rows-per-part", "0"], "rows_per_part = 0: must be at least 1"),
        (["--output", "out", "--engine", "ray", "--workers", "-1"], "at least 1"),
        (["--output", "out", "--engine", "ray", "--workers", "0"], "at least 1"),
        (["--output", "out", "--workers", "2"], "goes with --engine ray"),
        (["--output", "out", "--engine", "ray", "--device", "cuda:1"], "device = 'cuda:1'"),
        (["--output", "."], "holds other files"),
        (["--output", "out", "--model", "absent"], "absent"),
    ],
)
def test_mistakes_are_named(folder, arguments, message, capsys):
    assert main(["score", "--input", "rows.jsonl", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""
