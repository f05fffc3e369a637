"""Runs that go on after their pictures have changed: refused by name, or their rejects tried again."""

import json
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from dina_lrm import InvalidInputError
from dina_lrm.cli.main import main
from dina_lrm.scaling import places
from tests.local_server import answering
from tests.unit.cli.fakes import BrightnessModel, use_brightness_model
from tests.unit.scaling.test_bulk import pictures, png, read_parts, score, write_lines, write_shard  # noqa: F401


@pytest.fixture
def ten(pictures):  # noqa: F811
    """Rows for 0.png to 9.png; 7.png is missing."""
    (pictures / "7.png").unlink()
    rows = [{"prompt": "gray", "image": f"{n}.png"} for n in range(10)]
    return Path(write_lines(pictures / "rows.jsonl", rows))


def interrupt(source, output, parts=3):
    """A run, three rows a part, that is stopped after some parts."""

    def stop(done, total):
        if done > 3 * parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(source, output, on_progress=stop)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "4.png").write_bytes(png(200)), r"'4\.png' has changed since '.*000001"),
        (lambda folder: (folder / "4.png").unlink(), r"'4\.png' is gone since '.*part-000001\.parquet'"),
        (lambda folder: (folder / "7.png").write_bytes(png(70)), r"'7\.png' was not there, and is now since"),
    ],
)
def test_a_picture_that_is_not_what_was_scored_is_named(ten, change, told):
    output = ten.parent / "out"
    interrupt(ten, output)
    change(ten.parent)
    model = BrightnessModel()
    with pytest.raises(InvalidInputError, match=told):
        score(ten, output, model)
    assert model.calls == []
    assert score(ten, output, overwrite=True).parts_found == 0
    assert score(ten, output).parts_found == 4


def test_a_picture_of_a_part_that_is_not_done_may_change(ten):
    output = ten.parent / "out"
    interrupt(ten, output)
    (ten.parent / "9.png").write_bytes(png(200))
    assert score(ten, output).parts_found == 3
    assert read_parts(output)["score"].to_pylist()[9] == pytest.approx(200 / 255)


def test_put_back_it_goes_on(ten):
    output = ten.parent / "out"
    interrupt(ten, output)
    shutil.move(ten.parent / "4.png", ten.parent / "aside.png")
    (ten.parent / "4.png").write_bytes(png(1))
    (ten.parent / "5.png").write_bytes(png(1))
    with pytest.raises(InvalidInputError, match=r"'4\.png' .*changed.* 1 more"):
        score(ten, output)
    shutil.move(ten.parent / "aside.png", ten.parent / "4.png")
    (ten.parent / "5.png").write_bytes(png(50))
    assert score(ten, output).parts_found == 3


def test_rejects_are_tried_again(ten):
    """Only the parts that have any; the folder is then that of a run that has found all pictures."""
    output = ten.parent / "out"
    assert score(ten, output).rejected == 1
    untouched = (output / "part-000000.parquet").stat().st_mtime_ns
    (ten.parent / "7.png").write_bytes(png(70))
    with pytest.raises(InvalidInputError, match="--retry-rejects"):
        score(ten, output)
    summary = score(ten, output, retry_rejects=True)
    assert (summary.rejected, summary.rejects, summary.parts_found) == (0, None, 3)
    assert not (output / "rejects.jsonl").exists()
    assert json.loads((output / "summary.json").read_text())["rejected"] == 0
    assert (output / "part-000000.parquet").stat().st_mtime_ns == untouched
    fresh = ten.parent / "fresh"
    score(ten, fresh)
    for part in fresh.glob("part-*"):
        assert part.read_bytes() == (output / part.name).read_bytes()
    assert score(ten, output, retry_rejects=True).parts_found == 4


def test_rejects_that_stay_are_kept(ten):
    score(ten, ten.parent / "out")
    summary = score(ten, ten.parent / "out", retry_rejects=True)
    assert (summary.rejected, summary.parts_found) == (1, 3)
    assert "7.png" in (ten.parent / "out" / "rejects.jsonl").read_text()


def test_a_change_beside_a_reject_is_no_mixture(ten):
    """Its part is done again as a whole."""
    score(ten, ten.parent / "out")
    (ten.parent / "6.png").write_bytes(png(200))
    with pytest.raises(InvalidInputError, match="has changed"):
        score(ten, ten.parent / "out")
    score(ten, ten.parent / "out", retry_rejects=True)
    assert read_parts(ten.parent / "out")["score"].to_pylist()[6] == pytest.approx(200 / 255)
    (ten.parent / "2.png").write_bytes(png(200))  # of a part without a reject
    with pytest.raises(InvalidInputError, match=r"'2\.png' .*changed.* put back"):
        score(ten, ten.parent / "out", retry_rejects=True)


def test_pictures_inside_a_table_or_a_shard(tmp_path):
    """Also where size, time and footer are what they were."""
    shard = write_shard(tmp_path / "a.tar", range(6))
    table = tmp_path / "rows.parquet"
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(6)]
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["gray"] * 6, "image": cells}),
        table,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    other = next(png(n) for n in range(100, 200) if len(png(n)) == len(png(4)))
    for number, source in enumerate((shard, table)):
        output = tmp_path / f"out{number}"
        score(source, output)
        before = source.read_bytes()
        assert before.count(png(4)) == 1
        source.write_bytes(before.replace(png(4), other))
        with pytest.raises(InvalidInputError, match=rf"rows 3 to 5 .*{source.name}' .*changed"):
            score(source, output)
        source.write_bytes(before)
        assert score(source, output).parts_found == 2


def test_pictures_on_a_store(tmp_path):
    """By size and time, which are asked for and not the content; tables by their own."""
    memory = fsspec.filesystem("memory")
    for number in range(4):
        memory.pipe_file(f"/changes/{number}.png", png(number))
    rows = [{"prompt": "gray", "image": f"{n}.png"} for n in range(4)]
    memory.pipe_file("/changes/rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    columns = {"prompt": ["gray"] * 4, "image": [png(n) for n in range(4)]}
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    memory.pipe_file("/changes/rows.parquet", table.getvalue().to_pybytes())
    try:
        score("memory://changes/rows.jsonl", tmp_path / "named")
        score("memory://changes/rows.parquet", tmp_path / "inside")
        assert score("memory://changes/rows.jsonl", tmp_path / "named").parts_found == 2
        assert score("memory://changes/rows.parquet", tmp_path / "inside").parts_found == 2
        memory.pipe_file("/changes/2.png", png(3))
        memory.pipe_file("/changes/rows.parquet", table.getvalue().to_pybytes())
        with pytest.raises(InvalidInputError, match=r"'2\.png' has changed"):
            score("memory://changes/rows.jsonl", tmp_path / "named")
        with pytest.raises(InvalidInputError, match="another input"):
            score("memory://changes/rows.parquet", tmp_path / "inside")
    finally:
        memory.rm("/changes", recursive=True)


class Web(BaseHTTPRequestHandler):
    """a.png has a version, b.png a time; /mute.png answers no HEAD."""

    def do_GET(self):
        found = self.server.found.get(self.path)
        self.send_response(404 if found is None else 200)
        body, told = found or (b"", {})
        for name, value in (told | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        if self.path == "/mute.png":
            self.send_error(405)
        else:
            self.do_GET()

    def log_message(self, *_):
        pass


def test_pictures_on_the_web(tmp_path, monkeypatch):
    from http.server import ThreadingHTTPServer

    monkeypatch.setattr(places, "HTTP_RETRIES", 0)
    places._web.cache_clear()
    when = {"last-modified": "Sat, 28 Nov 2026 16:00:00 GMT"}
    found = {
        "/a.png": (png(1), {"etag": '"1"'}),
        "/b.png": (png(2), when),
        "/mute.png": (png(3), when),
        "/plain.png": (png(4), {}),
    }
    monkeypatch.setattr(ThreadingHTTPServer, "found", found, raising=False)
    with answering(Web) as address:
        names = [*found, "/none.png"]
        rows = [{"prompt": "gray", "image": address + name} for name in names]
        source = write_lines(tmp_path / "rows.jsonl", rows)
        assert score(source, tmp_path / "out").rejected == 1
        assert score(source, tmp_path / "out").parts_found == 2
        for name, other, told in (
            ("/a.png", (png(1), {"etag": '"2"'}), "has changed"),
            ("/b.png", (png(2), {"last-modified": "Sat, 28 Nov 2026 17:00:00 GMT"}), "has changed"),
            ("/b.png", None, "is gone"),
            ("/none.png", (png(5), {}), None),  # the server tells nothing of it that could be compared
            ("/none.png", (png(5), when), "was not there, and is now"),
        ):
            before = found.get(name)
            found[name] = other
            if told is None:
                assert score(source, tmp_path / "out").parts_found == 2
            else:
                with pytest.raises(InvalidInputError, match=rf"{name}' {told}"):
                    score(source, tmp_path / "out")
            found[name] = before
    places._web().close()
    places._web.cache_clear()


def test_a_part_that_says_nothing_of_its_pictures(ten):
    score(ten, ten.parent / "out")
    part = ten.parent / "out" / "part-000001.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(part).replace_schema_metadata(), part)
    with pytest.raises(InvalidInputError, match=r"part-000001\.parquet.*does not say which pictures"):
        score(ten, ten.parent / "out")


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["out", "out.csv", "out.parquet"])
def test_the_command_tries_again(ten, output, monkeypatch, capsys):
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(ten.parent)
    command = ["score", "--input", "rows.jsonl", "--output", output, "--rows-per-part", "3"]
    assert main(command) == 0
    assert "--retry-rejects tries them again" in capsys.readouterr().err
    Path("7.png").write_bytes(png(70))
    assert main(command) == 2
    assert "--retry-rejects" in capsys.readouterr().err
    assert main([*command, "--retry-rejects"]) == 0
    capsys.readouterr()
    if output == "out":
        table = read_parts(Path(output))
    elif output == "out.csv":
        table = pyarrow.csv.read_csv(output)
    else:
        table = pyarrow.parquet.read_table(output)
        assert table.schema.metadata is None
    assert table["score"].to_pylist()[7] == pytest.approx(70 / 255)
    assert not Path(f"{output}.parts").exists()
    assert not list(Path().glob("*rejects*"))
    assert main([*command, "--retry-rejects", "--overwrite"]) == 2
    assert "leave out --retry-rejects" in capsys.readouterr().err
