"""What goes wrong with the surroundings of a command is one clear line, and nothing half written is left."""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from dina_lrm.cli import main as cli
from tests.rows import write_json_lines
from tests.unit.cli.fakes import use_brightness_model

ROWS = ["--input", "rows.jsonl"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures, rows, an empty file, a file that is in the way; the working directory."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [
        {"prompt": "gray", "image": "a.png", "image_a": "a.png", "image_b": "b.png", "id": n}
        for n in range(4)
    ]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    for name in ("empty.png", "empty.jsonl", "empty.csv", "file"):
        (tmp_path / name).touch()
    use_brightness_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "gray", "empty.png"], "empty file: empty.png"),
        (["rank", "gray", "a.png", "."], ". is a folder"),
        (["compare", "gray", "a.png", "empty.png"], "empty file: empty.png"),
        (["score", "--input", "empty.jsonl", "--output", "o.csv"], "'empty.jsonl' holds no rows"),
        (["score", "--input", "empty.csv", "--output", "o.csv"], "holds no rows"),
        (["compare", "--input", "empty.jsonl", "--output", "o"], "'empty.jsonl' holds no rows"),
        (["score", "--input", ".", "--output", "o.csv"], "'.' has .csv, .jsonl: give files of one kind"),
        (["score", *ROWS, "--output", "file/o.csv"], "Not a directory: "),
        (["score", *ROWS, "--output", "file"], "exists"),
        (["score", *ROWS, "--output", "nowhere://o"], "nowhere"),
        (["score", *ROWS, "--output", "/dev/full"], "/dev/full"),
        (["search", "gray", "--output", "file"], "exists: file"),
        (["doctor", "--nonsense"], "--nonsense"),
        (["demo", "--train-seconds", "0"], "--train-seconds is above 0"),
        (["label", "--input", "rows.jsonl", "--output", "."], "."),
        (["label", "export", "absent.sqlite", "--output", "o.jsonl"], "absent.sqlite"),
        (["serve", "--host", "192.0.2.1"], "cannot listen at --host 192.0.2.1"),
        (["align", "refl", "absent"], "'absent'"),
    ],
)
def test_one_clear_line(folder, arguments, message, capsys):
    before = sorted(folder.rglob("*"))
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_an_unknown_option_is_named(command, capsys):
    before = {"train": ["shapes"], "align": ["refl", "shapes"]}.get(command, [])
    required = {"inspect": ["jsonl"], "audit": ["jsonl", "--root", "."]}
    required |= {"prepare": ["jsonl", "--output", "o"], "label": ["--input", "i", "--output", "o"]}
    assert cli.main([command, *before, *required.get(command, []), "--nonsense"]) == 2
    captured = capsys.readouterr()
    assert "--nonsense" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_begins_with_what_one_would_type(command, capsys):
    assert cli.main([command, "--help"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"try: {cli.COMMANDS[command].example}"
    assert first.startswith(f"try: dina-lrm {command}")


def test_the_overview_begins_so_too_and_tells_the_exit_codes(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("try: dina-lrm score")
    assert cli.main(["--help"]) == 0
    assert "Exit codes: 0 success, 1 the run failed, 2 wrong usage" in capsys.readouterr().out


def test_the_page_of_the_command_line_lists_the_same():
    page = (Path(__file__).parents[3] / "docs/guides/command_line.md").read_text()
    for name, command in cli.COMMANDS.items():
        assert f"| `{name}` |" in page
        assert f"`{command.example}` |" in page


def test_help_of_an_algorithm(capsys):
    assert cli.main(["align", "refl", "--help"]) == 0
    assert "usage: dina-lrm align refl shapes" in capsys.readouterr().out


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond a size; as on a disk that is full, writing fails."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("output", ["o", "o.parquet", "o.jsonl"])
def test_a_full_disk(folder, output, full_disk, capsys):
    """The run fails with a line that says how to go on; then it goes on."""
    arguments = ["score", *ROWS, "--output", output, "--rows-per-part", "2"]
    full_disk(1000)
    assert cli.main(arguments) == 1
    full_disk(resource.RLIM_INFINITY if resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0 else 10**9)
    error = capsys.readouterr().err
    assert "File too large" in error
    assert "what was done is kept: give the same command again" in error
    assert "Traceback" not in error
    assert not list(folder.rglob("*.partial"))
    assert cli.main(arguments) == 0


def test_a_full_stdout(folder):
    import subprocess

    code = (
        "import sys; from dina_lrm.cli import main as cli, listed, score;"
        "score.score_pictures = lambda *a, **k: (None, [('a.png', {'score': 1.0, 'standard_error': None})]);"
        "sys.argv[1:] = ['score', 'gray', 'a.png']; cli.run()"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: No space left on device"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / "closed").mkdir(mode=0o500)
    assert cli.main(["score", *ROWS, "--output", "closed/o.csv"]) == 1
    assert "Permission denied: " in capsys.readouterr().err
