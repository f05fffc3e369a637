"""Could Ray Data's checkpoints stand in for the parts of `dina-lrm score --engine ray`?

    python benchmarks/ray_data_checkpoint.py --output WORK --results benchmarks/results

Rows with a text file each are read, "scored" (the file's length, and whose seed it was) and written with Ray
Data under a `CheckpointConfig`; the command is killed under way and given again. Asked: is every row there
once; are the output files those of a run that was not killed; what does the second command do about an input
file that has changed, and about another seed; what about a row that failed. Prints one JSON object.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import tyro
from record import write_results


@dataclass(frozen=True, kw_only=True)
class Options:
    output: Path
    """New folder."""
    rows: int = 2000
    blocks: int = 20
    """Files of the input, and blocks that are made of them."""
    results: Path | None = None
    """Folder that receives ray_data_checkpoint.md."""


def main(options: Options) -> None:
    folder = options.output.resolve()
    folder.mkdir(parents=True)
    for row in range(options.rows):
        (folder / f"{row}.txt").write_text("x" * (row % 100))
    size = -(-options.rows // options.blocks)
    missing = range(size // 2, options.rows, size)  # one in each block
    for row in missing:
        (folder / f"{row}.txt").rename(folder / f"{row}.aside")
    names = [f"{folder}/{row}.txt" for row in range(options.rows)]
    table = pyarrow.table({"id": range(options.rows), "file": names})
    (folder / "rows").mkdir()
    for block in range(options.blocks):
        part = table.slice(block * size, size)
        pyarrow.parquet.write_table(part, folder / "rows" / f"{block:03d}.parquet")

    whole = written(folder / "whole", run(folder, "whole", options, seed=0))
    killed_after = run(folder, "cut", options, seed=0, kill_after=options.blocks // 3)
    before = written(folder / "cut", killed_after)
    done = next(row for row in before["ids"] if row not in missing)
    failed = next(row for row in before["ids"] if row in missing)
    (folder / f"{done}.txt").write_text("changed" * 100)
    for row in missing:
        (folder / f"{row}.aside").rename(folder / f"{row}.txt")
    after = written(folder / "cut", run(folder, "cut", options, seed=1))

    import ray

    record: dict[str, Any] = {
        "ray": ray.__version__,
        "rows": options.rows,
        "rows_found_after_the_kill": len(before["ids"]),
        "every_row_once": sorted(after["ids"]) == list(range(options.rows)),
        "doubled": sum(count - 1 for count in Counter(after["ids"]).values()),
        "files_uninterrupted": whole["files"],
        "files_resumed": after["files"],
        "same_file_names": whole["names"] == after["names"],
        "same_rows_in_each_file": whole["rows_of_files"] == after["rows_of_files"],
        "rows_in_input_order": whole["ids"] == sorted(whole["ids"]),
        "seeds_in_the_output": sorted(set(after["seeds"].values())),
        "changed_file_scored_again": after["lengths"][done] == 700,
        "failed_row_tried_again": after["lengths"][failed] is not None,
    }
    print(json.dumps(record))
    if options.results is not None:
        rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in record.items())
        text = f"Ray Data with `CheckpointConfig`, killed and given again.\n\n| | |\n|---|---|\n{rows}\n\n"
        write_results(options.results, "ray_data_checkpoint", record, text, seeds=[0, 1])
    shutil.rmtree(folder)


def run(folder: Path, name: str, options: Options, *, seed: int, kill_after: int | None = None) -> int:
    """Run the pipeline in a process; kill that as soon as it has written some files. Its exit code."""
    command = [sys.executable, __file__, "pipeline", str(folder), name, str(options.blocks), str(seed)]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
    while process.poll() is None:
        if kill_after is not None and len(list((folder / name).glob("*.parquet"))) >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return -signal.SIGKILL
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the pipeline has ended with code {process.returncode}, see {folder}/log")
    return 0


def pipeline(folder: Path, name: str, blocks: int, seed: int) -> None:
    """What is run, and killed."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(folder / f"{name}-checkpoint"),
        delete_checkpoint_on_success=False,
    )

    def score(batch: Any) -> Any:
        time.sleep(1)
        lengths = [len(Path(file).read_text()) if Path(file).exists() else None for file in batch["file"]]
        return {"id": batch["id"], "length": lengths, "seed": [seed] * len(lengths)}

    # Not from JSON lines: the filter of a second run takes Arrow's blocks only, and those of read_json are
    # pandas' (AssertionError in filter_rows_for_block, Ray 2.60.0).
    rows = ray.data.read_parquet(str(folder / "rows")).repartition(blocks)
    rows.map_batches(score, batch_size=None).write_parquet(str(folder / name))


def written(folder: Path, code: int) -> dict[str, Any]:
    """What lies in an output."""
    files = sorted(folder.rglob("*.parquet"))
    tables = [pyarrow.parquet.read_table(file).to_pylist() for file in files]
    rows = [row for table in tables for row in table]
    return {
        "code": code,
        "files": len(files),
        "names": [file.name for file in files],
        "rows_of_files": sorted(tuple(row["id"] for row in table) for table in tables),
        "ids": [row["id"] for row in rows],
        "lengths": {row["id"]: row["length"] for row in rows},
        "seeds": {row["id"]: row["seed"] for row in rows},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["pipeline"]:
        pipeline(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(tyro.cli(Options))
