"""Datasets scored in parts, around a model that is known: input, output, what is left, what is refused."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from dina_lrm import InvalidInputError
from dina_lrm.scaling.bulk import BulkJob, Scoring, score_dataset
from tests.pictures import encoded, gray_picture, write_grays
from tests.rows import write_json_lines
from tests.unit.cli.fakes import BrightnessModel


def png(brightness: int) -> bytes:
    """A gray picture; its score by a BrightnessModel is brightness / 255."""
    return encoded(gray_picture(brightness))


@pytest.fixture
def pictures(tmp_path):
    """0.png to 9.png, of brightness 0, 10, ... 90."""
    write_grays(tmp_path, 10, step=10)
    return tmp_path


def write_lines(path, rows):
    return str(write_json_lines(path, rows))


def score(
    source,
    output,
    model=None,
    rows_per_part=3,
    overwrite=False,
    retry_rejects=False,
    on_progress=None,
    **settings,
):
    scoring = Scoring(**settings)
    job = BulkJob(input=str(source), output=str(output), scoring=scoring, rows_per_part=rows_per_part)
    listen = {} if on_progress is None else {"on_progress": on_progress}
    return score_dataset(
        job, model=model or BrightnessModel(), overwrite=overwrite, retry_rejects=retry_rejects, **listen
    )


def read_parts(folder):
    """Rows of all parts, in the order of the parts; all have one schema."""
    tables = [pyarrow.parquet.read_table(path) for path in sorted(Path(folder).glob("part-*.parquet"))]
    return pyarrow.concat_tables(tables)


# --- what comes out ----------------------------------------------------------------------------------------


def test_every_line_has_one_result_and_keeps_its_columns(pictures):
    good = [{"prompt": "gray", "image": f"{n}.png", "id": f"x{n}", "weight": n or 0.5} for n in range(5)]
    bad = ['{"prompt": "gray"', {"prompt": 3, "image": "1.png"}, {"prompt": "gray", "image": "absent.png"}]
    source = write_lines(pictures / "rows.jsonl", [*good[:2], *bad, "", *good[2:]])
    summary = score(source, pictures / "out")
    assert (summary.rows, summary.scored, summary.rejected, summary.parts) == (8, 5, 3, 3)
    table = read_parts(pictures / "out")
    assert table.column_names == [
        "row",
        "prompt",
        "image",
        "id",
        "weight",
        "score",
        "standard_error",
        "error",
    ]
    assert table["row"].to_pylist() == list(range(8))
    assert table["id"].to_pylist() == ["x0", "x1", None, None, None, "x2", "x3", "x4"]
    assert table["weight"].to_pylist() == [0.5, 1.0, None, None, None, 2.0, 3.0, 4.0]
    scores = table["score"].to_pylist()
    assert [one for one in scores if one is not None] == pytest.approx([n * 10 / 255 for n in range(5)])
    assert [one is None for one in scores] == [one is not None for one in table["error"].to_pylist()]
    rejects = [json.loads(line) for line in (pictures / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [2, 3, 4]
    for reject, reason in zip(rejects, ["not JSON", "type int", "missing file"], strict=True):
        assert reason in reject["error"]


def test_columns_of_mixed_values_are_json_text(pictures):
    rows = [
        {"prompt": "gray", "image": "1.png", "a": 1, "b": [1, 2], "c": True, "d": None, "e": 2**70},
        {"prompt": "gray", "image": "2.png", "a": "x", "c": False, "f": "half a pair: \ud800"},
    ]
    summary = score(write_lines(pictures / "rows.jsonl", rows), pictures / "out", rows_per_part=1)
    assert summary.scored == 2
    first, second = read_parts(pictures / "out").to_pylist()
    assert (first["a"], second["a"]) == ("1", '"x"')
    assert (first["b"], second["b"]) == ("[1, 2]", None)
    assert (first["c"], second["c"]) == (True, False)
    assert (first["d"], first["e"]) == (None, str(2**70))
    assert second["f"] == "half a pair: \\ud800"


@pytest.mark.parametrize("row_group_size", [2, 5, 100])
def test_parquet_keeps_types_and_leaves_pictures_out(tmp_path, row_group_size):
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(11)]
    columns = {
        "image": cells,
        "when": pyarrow.array(range(11), pyarrow.timestamp("ns")),
        "prompt": ["gray"] * 11,
        "tags": [["a", "b"][: n % 3] for n in range(11)],
    }
    source = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), source, row_group_size=row_group_size)
    assert score(source, tmp_path / "out", batch_size=2, rows_per_part=4).scored == 11
    table = read_parts(tmp_path / "out")
    assert table["score"].to_pylist() == pytest.approx([n / 255 for n in range(11)])
    assert table["image"].to_pylist() == [f"{n}.png" for n in range(11)]
    assert table["when"].type == pyarrow.timestamp("ns")
    assert table["when"].cast(pyarrow.int64()).to_pylist() == list(range(11))
    assert table["tags"].to_pylist() == columns["tags"]


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path, numbers):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for n in numbers:
            key = f"{'long/' * 30}{n:03d}"  # a name that takes a header of its own
            add(tar, f"{key}.png", png(n))
            if n % 2:
                add(tar, f"{key}.txt", b"gray\n")
            add(tar, f"{key}.json", json.dumps({"caption": "gray", "n": n}).encode())
    return path


def test_tar_shards(tmp_path):
    write_shard(tmp_path / "b.tar", range(5, 9))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        add(tar, "._9.png", b"what a Mac leaves")
        add(tar, "9.txt", b"no picture")
        add(tar, "10.png", png(10))
        add(tar, "11.png", png(11))
        add(tar, "11.jpg", png(11))
        add(tar, "11.txt", b"two pictures")
    write_shard(tmp_path / "a.tar", range(5))
    (tmp_path / "README.md").write_text("not a shard")
    summary = score(tmp_path, tmp_path.with_name(tmp_path.name + "-out"), rows_per_part=2)
    assert (summary.rows, summary.scored, summary.parts) == (12, 9, 7)  # 3 + 2 + 2: a part lies in one file
    rows = read_parts(summary.output).to_pylist()
    assert [row["score"] for row in rows[:9]] == pytest.approx([n / 255 for n in range(9)])
    assert [row["row"] for row in rows] == list(range(12))
    assert {row["prompt"] for row in rows[:9]} == {"gray"}
    assert json.loads(rows[3]["json"]) == {"caption": "gray", "n": 3}
    assert rows[3]["image"].endswith("long/003.png")
    assert [row["key"] for row in rows[9:]] == ["9", "10", "11"]
    reasons = ["image is missing", "prompt is missing", "2 pictures in one sample"]
    assert [row["error"] for row in rows[9:]] == reasons


def test_a_folder_on_another_filesystem(tmp_path):
    memory = fsspec.filesystem("memory")
    for number in range(4):
        memory.pipe_file(f"/bulk/in/pictures/{number}.png", png(number))
    for name, numbers in (("1.jsonl", (0, 1)), ("2.jsonl", (2, 3, 4))):
        lines = [json.dumps({"prompt": "gray", "image": f"pictures/{n}.png"}) for n in numbers]
        memory.pipe_file(f"/bulk/in/{name}", "\n".join(lines).encode())
    try:
        summary = score("memory://bulk/in/*.jsonl", "memory://bulk/out", rows_per_part=2)
        assert (summary.rows, summary.scored, summary.parts) == (5, 4, 3)
        assert summary.rejects == "memory://bulk/out/rejects.jsonl"
        with memory.open("/bulk/out/part-000001.parquet") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        assert [row["row"] for row in rows] == [2, 3]
        assert [row["score"] for row in rows] == pytest.approx([2 / 255, 3 / 255])
        assert json.loads(memory.cat_file(summary.rejects.removeprefix("memory:/")))["row"] == 4
        again = score("memory://bulk/in/*.jsonl", "memory://bulk/out", rows_per_part=2)
        assert again.parts_found == 3
    finally:
        memory.rm("/bulk", recursive=True)


def test_a_picture_by_url(pictures):
    source = write_lines(pictures / "rows.jsonl", [{"prompt": "gray", "image": f"file://{pictures}/7.png"}])
    assert score(source, pictures / "out").scored == 1
    assert read_parts(pictures / "out")["score"].to_pylist() == pytest.approx([70 / 255])


def test_a_score_that_is_not_finite_is_a_reject(pictures):
    class Broken(BrightnessModel):
        def score(self, prompts, images, **settings):
            output = super().score(prompts, images, **settings)
            output.scores[output.scores > 0.1] = float("nan")
            return output

    rows = [{"prompt": "gray", "image": f"{n}.png"} for n in (1, 9)]
    summary = score(write_lines(pictures / "rows.jsonl", rows), pictures / "out", Broken())
    assert summary.rejected == 1
    assert "not finite" in read_parts(pictures / "out")["error"].to_pylist()[1]


# --- runs that go on, and runs that do not -----------------------------------------------------------------


@pytest.fixture
def ten(pictures):
    rows = [{"prompt": "gray", "image": f"{n}.png"} for n in range(10)]
    return write_lines(pictures / "rows.jsonl", rows)


def test_a_run_goes_on_at_the_parts_that_are_missing(ten, tmp_path):
    output = tmp_path / "out"

    class Interrupted(BrightnessModel):
        def score(self, prompts, images, **settings):
            if len(self.calls) == 5:
                raise KeyboardInterrupt
            return super().score(prompts, images, **settings)

    with pytest.raises(KeyboardInterrupt):
        score(ten, output, Interrupted(), batch_size=1)
    assert [path.name for path in sorted(output.glob("part-*"))] == ["part-000000.parquet"]
    assert not (output / "summary.json").exists()
    (output / "part-000001.parquet.77.partial").write_bytes(b"left by a worker that was killed")
    first = (output / "part-000000.parquet").stat()

    model = BrightnessModel()
    heard = []
    summary = score(ten, output, model, batch_size=1, on_progress=lambda *now: heard.append(now))
    assert sorted(set(heard)) == [(done, 10) for done in range(3, 11)]  # row by row, as the batches are
    assert len(model.calls) == 7
    assert (summary.parts, summary.parts_found, summary.scored) == (4, 1, 10)
    assert (output / "part-000000.parquet").stat().st_mtime_ns == first.st_mtime_ns
    assert not list(output.glob("*.partial"))
    assert read_parts(output)["row"].to_pylist() == list(range(10))

    finished = BrightnessModel()
    assert score(ten, output, finished, batch_size=1).parts_found == 4
    assert finished.calls == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "another seed"),
        ({"noise_levels": (0.2, 0.5)}, "another noise_levels"),
        ({"num_draws": 2}, "another num_draws"),
        ({"rows_per_part": 4}, "another rows_per_part"),
    ],
)
def test_another_run_is_refused(ten, tmp_path, changed, named):
    score(ten, tmp_path / "out")
    with pytest.raises(InvalidInputError, match=named):
        score(ten, tmp_path / "out", **changed)
    assert score(ten, tmp_path / "out", overwrite=True, **changed).parts_found == 0


def test_another_input_is_refused(ten, tmp_path):
    score(ten, tmp_path / "out")
    text = Path(ten).read_text()
    Path(ten).write_text(text.replace("gray", "grey"))
    with pytest.raises(InvalidInputError, match="another input"):
        score(ten, tmp_path / "out")


def test_other_weights_are_refused(ten, tmp_path, monkeypatch):
    score(ten, tmp_path / "out")
    from dina_lrm.checkpoints import dina as checkpoint

    genuine = checkpoint.read_checkpoint

    def changed(location):
        found = genuine(location)
        next(iter(found.head.values())).flatten()[0] += 1e-3
        return found

    monkeypatch.setattr(checkpoint, "read_checkpoint", changed)
    with pytest.raises(InvalidInputError, match="another weights_sha256"):
        score(ten, tmp_path / "out")


def test_files_of_others_are_left_alone(ten, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "part-000000.parquet").write_bytes(b"somebody else's")
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match="holds other files"):
            score(ten, output, overwrite=overwrite)
    assert (output / "part-000000.parquet").read_bytes() == b"somebody else's"


def test_overwriting_takes_away_what_is_left_of_a_longer_run(ten, tmp_path):
    score(ten, tmp_path / "out", rows_per_part=1)
    score(ten, tmp_path / "out", rows_per_part=5, overwrite=True)
    assert len(list((tmp_path / "out").glob("part-*"))) == 2


@pytest.mark.parametrize("damage", ["torn", "rows of another part"])
def test_a_damaged_part_is_found(ten, tmp_path, damage):
    score(ten, tmp_path / "out")
    part = tmp_path / "out" / "part-000002.parquet"
    other = (tmp_path / "out" / "part-000001.parquet").read_bytes()
    part.write_bytes(b"torn" if damage == "torn" else other)
    with pytest.raises(InvalidInputError, match=r"part-000002\.parquet.*delete it"):
        score(ten, tmp_path / "out")
    part.unlink()
    assert score(ten, tmp_path / "out").parts_found == 3


def test_two_runs_do_not_share_a_folder(ten, tmp_path):
    def second(done, total):
        with pytest.raises(InvalidInputError, match="another run is writing"):
            score(ten, tmp_path / "out")

    score(ten, tmp_path / "out", on_progress=second)


# --- what is refused ---------------------------------------------------------------------------------------


def test_input_that_cannot_be_read_is_named(pictures):
    write_lines(pictures / "empty.jsonl", [])
    write_lines(pictures / "taken.jsonl", [{"prompt": "gray", "image": "1.png", "score": 2}])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), pictures / "columns.parquet")
    (pictures / "torn.parquet").write_bytes(b"PAR1")
    whole = write_shard(pictures / "whole.tar", range(4)).read_bytes()
    (pictures / "torn.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (pictures / "text.tar").write_text("no tar\n" * 1000)
    (pictures / "none").mkdir()
    for name, message in {
        "absent.jsonl": "nothing at .*absent.jsonl",
        "none": "none' has no .parquet, .jsonl, .tar",
        "1.png": "has .png",
        "*.[jp]*": "has .jsonl, .parquet, .png",
        "empty.jsonl": "holds no rows",
        "taken.jsonl": "column 'score'",
        "columns.parquet": "no column image",
        "torn.parquet": "not a Parquet file",
        "torn.tar": "torn.tar",
        "text.tar": "no tar file",
    }.items():
        with pytest.raises(InvalidInputError, match=message):
            score(pictures / name, pictures / "out")
    assert not (pictures / "out").exists()
    with pytest.raises(InvalidInputError, match="nowhere"):
        score("nowhere://rows.jsonl", pictures / "out")


def test_files_with_different_columns_are_named(tmp_path):
    for name, columns in {"a": {}, "b": {"extra": [1]}}.items():
        table = pyarrow.table({"prompt": ["gray"], "image": [png(1)], **columns})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(InvalidInputError, match=r"different columns.*extra"):
        score(tmp_path, tmp_path / "out")


def test_an_input_that_changes_under_way_is_noticed(ten, tmp_path):
    def shorten(done, total):
        if done == 3:
            Path(ten).write_text(Path(ten).read_text()[:100])

    with pytest.raises(InvalidInputError, match="has changed since"):
        score(ten, tmp_path / "out", on_progress=shorten)
