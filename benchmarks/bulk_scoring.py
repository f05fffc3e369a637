"""Does a bulk run with Ray give one right score a row, whatever is killed on the way?

    python benchmarks/bulk_scoring.py --output WORK --results benchmarks/results

Writes pictures and rows (no two rows have the same prompt with the same picture, a few pictures are missing),
scores them with `dina-lrm score` in one process, and with `--engine ray`: at a third of the parts one worker
is killed, at two thirds the command itself, which is then given again. Every process has one thread. Prints
one JSON object; `complete` is false, or a difference above 1e-5, if anything was lost, doubled or wrong.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tyro
from record import write_results

from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import sample_caption, sample_scene

MARK = "BULK_SCORING_RUN"
"""Environment variable by which a run's workers are told from others on the machine."""


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """New folder for rows and scores."""
    rows: int = 50_000
    pictures: int = 400
    """Different pictures, with a caption each; rows pair all with all, as far as they go."""
    bad_every: int = 2500
    """Rows from one missing picture to the next."""
    workers: int = 2
    rows_per_part: int = 500
    seed: int = 0
    results: Path | None = None
    """Folder that receives bulk_scoring.json and bulk_scoring.md."""


def main(options: Options) -> None:
    if options.rows > options.pictures**2:
        raise SystemExit(f"{options.pictures} pictures make at most {options.pictures**2} different rows")
    options.output.mkdir(parents=True)
    source = write_rows(options)
    common = ["--input", str(source), "--seed", str(options.seed), "--noise-levels", "0.4", "--json"]
    one = Run([*common, "--output", str(options.output / "one.parquet")])
    alone = one.summary()
    sharded = [*common, "--engine", "ray", "--workers", str(options.workers)]
    sharded += ["--rows-per-part", str(options.rows_per_part), "--output", str(options.output / "ray")]
    first = Run(sharded)
    num_parts = -(-options.rows // options.rows_per_part)
    first.wait_for_parts(options.output / "ray", num_parts // 3)
    killed = min(first.workers())
    os.kill(killed, signal.SIGKILL)
    first.wait_for_parts(options.output / "ray", 2 * num_parts // 3)
    replaced = len(first.workers() - {killed}) == options.workers
    first.kill()
    second = Run(sharded)
    summary = second.summary()
    record = {
        "rows": options.rows,
        "rows_per_part": options.rows_per_part,
        "workers": options.workers,
        "parts": summary["parts"],
        "killed_worker_was_replaced": replaced,
        "parts_left_by_the_killed_command": summary["parts_found"],
        "one_process_seconds": round(one.seconds, 1),
        "ray_seconds": round(first.seconds + second.seconds, 1),
        "load_average": [one.load, max(first.load, second.load)],
        **compare(options.output),
        "scored": [alone["scored"], summary["scored"]],
        "rejected": [alone["rejected"], summary["rejected"]],
    }
    print(json.dumps(record), flush=True)
    if options.results is not None:
        write_results(options.results, "bulk_scoring", record, report(record), seeds=[options.seed])


def write_rows(options: Options) -> Path:
    """rows.jsonl: row i has picture i mod n, and the caption of a picture that is further on each round."""
    rng = np.random.default_rng(options.seed)
    captions: list[str] = []
    for number in range(options.pictures):
        spec = sample_caption(rng)
        render(sample_scene(rng, spec)).save(options.output / f"{number:04d}.png")
        captions.append(spec.caption)
    source = options.output / "rows.jsonl"
    with source.open("w") as file:
        for row in range(options.rows):
            turn, picture = divmod(row, options.pictures)
            missing = row % options.bad_every == options.bad_every - 1
            record = {
                "id": f"{uuid.uuid5(uuid.NAMESPACE_OID, str(row))}",
                "prompt": captions[(picture + turn) % options.pictures],
                "image": "missing.png" if missing else f"{picture:04d}.png",
            }
            file.write(json.dumps(record) + "\n")
    return source


class Run:
    """A `dina-lrm score` that goes on."""

    def __init__(self, arguments: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self.started = time.perf_counter()
        self.seconds = self.load = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dina_lrm", "score", *arguments],
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1", MARK: self.mark},
        )

    def summary(self) -> dict[str, Any]:
        """What it prints at its end."""
        output, _ = self.process.communicate()
        self._ended()
        if self.process.returncode != 0:
            raise SystemExit(f"dina-lrm score has ended with {self.process.returncode}")
        return json.loads(output)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._ended()

    def _ended(self) -> None:
        self.seconds = time.perf_counter() - self.started
        self.load = round(os.getloadavg()[2], 1)  # of the last 15 minutes

    def wait_for_parts(self, folder: Path, number: int) -> None:
        while len(list(folder.glob("part-*.parquet"))) < number:
            if self.process.poll() is not None:
                raise SystemExit("the run was over before it could be disturbed")
            time.sleep(0.02)

    def workers(self) -> set[int]:
        """Process ids of the Ray workers that hold a model."""
        found: set[int] = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes()
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue  # it has ended, or is not ours
            if title.startswith(b"ray::_Scorer") and f"{MARK}={self.mark}".encode() in environment:
                found.add(int(folder.name))
        return found


def compare(folder: Path) -> dict[str, Any]:
    """The parts against the file of the single process, row by row."""
    one = pyarrow.parquet.read_table(folder / "one.parquet")
    parts = [pyarrow.parquet.read_table(part) for part in sorted((folder / "ray").glob("part-*.parquet"))]
    many = pyarrow.concat_tables(parts)
    rows = many["row"].to_pylist()
    with (folder / "rows.jsonl").open() as lines:
        ids = [json.loads(line)["id"] for line in lines]
    complete = rows == list(range(one.num_rows)) and many["id"].to_pylist() == ids
    a, b = (table["score"].to_numpy().astype(float) for table in (one, many))
    return {
        "complete": complete,
        "doubled": len(rows) - len(set(rows)),
        "rows_compared": len(a),
        "same_rejects": one["error"].to_pylist() == many["error"].to_pylist(),
        "largest_difference": float(np.nanmax(np.abs(a - b))) if len(a) == len(b) else None,
        "spread_of_scores": round(float(np.nanstd(a)), 4),
    }


def report(record: dict[str, Any]) -> str:
    rate = {name: record["rows"] / record[f"{name}_seconds"] for name in ("one_process", "ray")}
    lines = [
        f"{record['rows']:,} rows of 64 x 64 pictures, noise level 0.4, parts of {record['rows_per_part']}; "
        "one worker killed at a third of the parts, the command at two thirds and given again. One thread a "
        f"process, {record['hardware']}, {record['date']}; the load average is that of the whole machine.",
        "",
        f"| | one process | Ray, {record['workers']} workers |",
        "|---|--:|--:|",
        f"| seconds | {record['one_process_seconds']:,} | {record['ray_seconds']:,} |",
        f"| rows a second | {rate['one_process']:.1f} | {rate['ray']:.1f} |",
        f"| load average at the end | {record['load_average'][0]} | {record['load_average'][1]} |",
        f"| scored | {record['scored'][0]:,} | {record['scored'][1]:,} |",
        f"| rejected | {record['rejected'][0]} | {record['rejected'][1]} |",
        "",
        f"Killed worker replaced: {yes(record['killed_worker_was_replaced'])}. Parts that the killed "
        f"command had left: {record['parts_left_by_the_killed_command']} of {record['parts']}. Every row "
        f"once, in order: {yes(record['complete'])}. Same rejects for the same reasons: "
        f"{yes(record['same_rejects'])}. "
        f"Largest difference of two scores of a row, over all {record['rows_compared']:,} rows: "
        f"{record['largest_difference']:.1e}; the standard deviation of the scores is "
        f"{record['spread_of_scores']}.",
        "",
        f"`{record['command']}`",
    ]
    return "\n".join(lines) + "\n"


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
