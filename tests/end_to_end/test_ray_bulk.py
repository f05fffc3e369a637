"""A bulk run with Ray, a worker and the command killed on the way, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import parse_caption, sample_scene

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bulk_scoring.py"


def test_one_right_score_a_row_whatever_is_killed(tmp_path):
    work = tmp_path / "work"
    options = ["--rows", "480", "--pictures", "40", "--rows-per-part", "20", "--bad-every", "100"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--output", str(work), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["killed_worker_was_replaced"]
    assert record["complete"]
    assert record["doubled"] == 0
    assert record["same_rejects"]
    assert record["largest_difference"] < 1e-5
    assert record["spread_of_scores"] > 0.1
    assert 8 <= record["parts_left_by_the_killed_command"] < 24
    assert record["scored"] == [476, 476]

    rejects = [json.loads(line) for line in (work / "ray" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [99, 199, 299, 399]
    assert all("missing.png" in reject["error"] for reject in rejects)
    lines = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    for number in (0, 23):
        part = pyarrow.parquet.read_table(work / "ray" / f"part-{number:06d}.parquet").to_pylist()
        assert [row["row"] for row in part] == list(range(20 * number, 20 * number + 20))
        expected = lines[20 * number : 20 * number + 20]
        assert [{name: row[name] for name in ("id", "prompt", "image")} for row in part] == expected


DEADLY = """
import os, signal
from PIL import Image

healthy = Image.open

def open(file, *args, **settings):
    if str(file).endswith("deadly.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return healthy(file, *args, **settings)

Image.open = open
"""


KILLS_THE_AGENTS = """
import os, signal, time
from pathlib import Path
from PIL import Image

healthy = Image.open

def open(file, *args, **settings):
    if str(file).endswith("deadly.png"):  # other children of the raylet that has started this worker
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == os.getppid() and b"agent" in (entry / "cmdline").read_bytes().lower():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue
        time.sleep(60)
    return healthy(file, *args, **settings)

Image.open = open
"""


@pytest.mark.parametrize(
    ("death", "said"),
    [
        (DEADLY, "rows 2 to 3 of 'rows.jsonl' have brought their worker down 4 times"),
        (KILLS_THE_AGENTS, "Ray has lost 1 of its 1 machines, or one of its own processes there"),
    ],
    ids=["worker", "agent"],
)
def test_what_is_killed_again_and_again_ends_the_run(tmp_path, death, said):
    (tmp_path / "sitecustomize.py").write_text(death)
    scene = sample_scene(np.random.default_rng(0), parse_caption("a red circle on a gray background"))
    names = ["0.png", "1.png", "deadly.png", "3.png"]
    for name in names:
        render(scene).save(tmp_path / name)
    rows = [{"prompt": "a red circle on a gray background", "image": name} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "dina_lrm", "score", "--input", "rows.jsonl", "--output", "out"]
    command += ["--engine", "ray", "--workers", "1", "--rows-per-part", "2", "--json"]
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    with_death = os.environ | {"PYTHONPATH": os.pathsep.join(path)}

    with (tmp_path / "log").open("w") as log:  # no pipe: what is left of Ray would hold it open
        failed = subprocess.run(command, cwd=tmp_path, env=with_death, stdout=log, stderr=log, check=False)
    text = (tmp_path / "log").read_text()
    assert failed.returncode == 1, text
    assert said in " ".join(text.split())
    assert "Traceback" not in text
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-000000.parquet"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["scored"], summary["parts"], summary["parts_found"]) == (4, 2, 1)
