"""Results in one file: all columns kept in every form, from every form of input, resumed where it stopped."""

import csv
import gzip
import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from dina_lrm import InvalidInputError
from dina_lrm.scaling.bulk import BulkJob, score_dataset
from dina_lrm.scaling.joined import score_to_file
from dina_lrm.scaling.settings import Scoring
from tests.pictures import write_grays
from tests.unit.cli.fakes import BrightnessModel

ROWS = [{"id": f"{n:03d}", "prompt": "gray, plain", "image": f"{n}.png"} for n in range(5)]
SCORES = [51 * n / 255 for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """0.png to 4.png."""
    write_grays(tmp_path, 5)
    return tmp_path


def write(path, rows):
    """Rows in the form that the name says."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        match path.name.partition(".")[2].removesuffix(".gz"):
            case "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            case "json":
                json.dump(rows, file)
            case "csv":
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
    return path


def score(source, output, model=None, overwrite=False, **settings):
    job = BulkJob(input=str(source), output=str(output), **{"rows_per_part": 2, **settings})
    run = score_to_file if output.suffix else score_dataset
    return run(job, model=model or BrightnessModel(), overwrite=overwrite)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "jsonl.gz", "json.gz", "csv.gz"])
@pytest.mark.parametrize("output", ["out.parquet", "out"])
def test_every_form_of_input_gives_the_same(folder, form, output):
    source = write(folder / f"rows.{form}", ROWS)
    summary = score(source, folder / output)
    assert (summary.rows, summary.scored, summary.rejects) == (5, 5, None)
    parts = [folder / output] if "." in output else sorted((folder / output).glob("part-*.parquet"))
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(part) for part in parts)
    assert table.column_names == ["row", "id", "prompt", "image", "score", "standard_error", "error"]
    assert table.select(["id", "prompt", "image"]).to_pylist() == ROWS
    assert table["row"].to_pylist() == list(range(5))
    assert table["score"].to_pylist() == pytest.approx(SCORES)
    assert not (folder / "out.parquet.parts").exists()


def test_every_form_of_output_keeps_all_columns(folder):
    """Lists, numbers that are none, texts with commas; a reject in between."""
    rows = [dict(row, tags=["a", "b"][:n], weight=n / 2, big=2**70) for n, row in enumerate(ROWS)]
    rows[1]["weight"] = math.nan
    rows[3]["image"] = "absent.png"
    source = write(folder / "rows.jsonl", rows)
    summary = score(source, folder / "out.jsonl")
    assert (summary.scored, summary.rejected) == (4, 1)
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [one["tags"] for one in found] == [row["tags"] for row in rows]
    assert [one["weight"] for one in found] == [0, None, 1, 1.5, 2]
    assert {one["big"] for one in found} == {2**70}
    assert [one["score"] for one in found if one["error"] is None] == pytest.approx([0, 0.2, 0.4, 0.8])
    assert "absent.png" in found[3]["error"]
    assert json.loads((folder / "out.jsonl.rejects.jsonl").read_text())["row"] == 3

    score(source, folder / "out.csv")
    with (folder / "out.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [one["id"] for one in cells] == ["000", "001", "002", "003", "004"]
    assert [json.loads(one["tags"]) for one in cells] == [row["tags"] for row in rows]
    assert cells[0]["prompt"] == "gray, plain"
    assert [float(one["score"] or "nan") for one in cells] == pytest.approx(
        [0, 0.2, 0.4, math.nan, 0.8], nan_ok=True
    )


def test_nested_columns_and_bytes_of_a_table(folder):
    table = pyarrow.table(
        {
            "prompt": ["gray"],
            "image": ["1.png"],
            "votes": [{"a": 1, "b": [2]}],
            "thumbnail": [b"\xff\x00"],
            "when": pyarrow.array([0], pyarrow.timestamp("s")),
        }
    )
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        score(folder / "rows.parquet", folder / name)
    kept = pyarrow.parquet.read_table(folder / "out.parquet")
    assert kept.select(table.column_names).to_pylist() == table.to_pylist()
    assert pyarrow.types.is_timestamp(kept["when"].type)
    record = json.loads((folder / "out.jsonl").read_text())
    assert record["votes"] == {"a": 1, "b": [2]}
    assert record["thumbnail"] == "/wA="
    assert record["when"] == "1970-01-01 00:00:00"
    with (folder / "out.csv").open(newline="") as file:
        (cells,) = csv.DictReader(file)
    assert json.loads(cells["votes"]) == {"a": 1, "b": [2]}
    assert cells["thumbnail"] == "/wA="


def test_rows_that_are_none_keep_their_place(folder):
    """In a list of JSON and in CSV, as in JSON lines."""
    (folder / "rows.json").write_text(json.dumps([ROWS[0], 3, {"prompt": "gray"}, ROWS[1]]))
    summary = score(folder / "rows.json", folder / "out.jsonl")
    assert (summary.rows, summary.scored) == (4, 2)
    errors = [json.loads(line)["error"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert "int" in errors[1]
    assert errors[2] == "image is missing"
    (folder / "rows.csv").write_text("prompt,image\ngray,1.png\ngray,2.png,too many\n,3.png\n")
    score(folder / "rows.csv", folder / "out.csv")
    with (folder / "out.csv").open(newline="") as file:
        errors = [one["error"] for one in csv.DictReader(file)]
    assert errors[0] == ""
    assert "3 cells" in errors[1]
    assert errors[2] == "prompt is missing"


class Interrupted(BrightnessModel):
    def score(self, prompts, images, **settings):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().score(prompts, images, **settings)


@pytest.mark.parametrize("form", ["jsonl", "csv.gz"])
def test_an_interrupted_run_ends_in_the_same_bytes(folder, form):
    source = write(folder / f"rows.{form}", ROWS)
    score(source, folder / "whole.parquet")
    with pytest.raises(KeyboardInterrupt):
        score(source, folder / "out.parquet", Interrupted())
    assert not (folder / "out.parquet").exists()
    assert score(source, folder / "out.parquet").parts_found == 2
    assert (folder / "out.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    with pytest.raises(InvalidInputError, match=r"out\.parquet' exists"):
        score(source, folder / "out.parquet")
    assert score(source, folder / "out.parquet", overwrite=True).parts_found == 0


def test_another_input_of_the_same_size_is_refused(folder):
    source = write(folder / "rows.csv", ROWS)
    with pytest.raises(KeyboardInterrupt):
        score(source, folder / "out.parquet", Interrupted())
    write(source, [dict(row, image=ROWS[4 - n]["image"]) for n, row in enumerate(ROWS)])
    with pytest.raises(InvalidInputError, match="another input"):
        score(source, folder / "out.parquet")
    assert score(source, folder / "out.parquet", overwrite=True).scored == 5


def test_rejects_of_an_earlier_run_are_not_written_over(folder):
    source = write(folder / "rows.jsonl", ROWS)
    (folder / "out.csv.rejects.jsonl").write_text("somebody's\n")
    with pytest.raises(InvalidInputError, match=r"out\.csv\.rejects\.jsonl' exists"):
        score(source, folder / "out.csv")
    assert (folder / "out.csv.rejects.jsonl").read_text() == "somebody's\n"


def test_no_file_of_the_readers_is_written_over(folder):
    """Results, rejects and input are three files, whatever --overwrite says."""
    source = write(folder / "rows.csv", [*ROWS, {"id": "x", "prompt": "gray", "image": "none.png"}])
    before = source.read_bytes()
    job = BulkJob(input=str(source), output=str(folder / "out.csv"))
    with pytest.raises(InvalidInputError, match="would both be"):
        score_to_file(job, model=BrightnessModel(), rejects=folder / "out.csv")
    with pytest.raises(InvalidInputError, match="is the input"):
        score_to_file(job, model=BrightnessModel(), rejects=source, overwrite=True)
    with pytest.raises(InvalidInputError, match="is the input"):
        score(source, source, overwrite=True)
    assert source.read_bytes() == before
    assert not (folder / "out.csv").exists()


def test_no_cell_is_lost(folder):
    """Rows that are rejects keep what they hold, and one that is no row is quoted."""
    lines = [{"prompt": ["gray"], "image": 7}, {"prompt": "a cat \ud83d", "image": "0.png"}]
    twice = '{"prompt": "gray", "prompt": "white", "image": "0.png"}'
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, lines), twice, '{"prompt": "cut', ""]))
    score(folder / "rows.jsonl", folder / "out.jsonl")
    first, second, third, fourth = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    assert (first["prompt"], first["image"]) == ('["gray"]', "7")
    assert (second["prompt"], second["image"]) == ("a cat \\ud83d", "0.png")
    assert "'prompt' stands twice" in third["error"]
    assert "cut" in fourth["error"]
    assert [one["score"] for one in (first, second, third, fourth)] == [None] * 4


def test_a_seed_is_looked_at_once():
    with pytest.raises(InvalidInputError, match=r"^seed = 18446744073709551616: must be from"):
        Scoring(seed=2**64)
