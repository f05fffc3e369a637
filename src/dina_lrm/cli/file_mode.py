"""`--input FILE --output FILE|FOLDER`: what `score` and `compare` do with rows of any number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table, resumable
from dina_lrm.cli.options import refuse
from dina_lrm.errors import InvalidInputError
from dina_lrm.runs.pace import WorkProgress

if TYPE_CHECKING:
    from dina_lrm.models.options import ModelOptions
    from dina_lrm.scaling.settings import Scoring, Task

FLAGS = (
    "--output",
    "--engine",
    "--workers",
    "--rows-per-part",
    "--rejects",
    "--overwrite",
    "--retry-rejects",
)
GO_ON = "what was done is kept: give the same command again, and it goes on"


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Rows instead of pictures on the command line."""

    input: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER|URL")] = None
    """Rows: .parquet, or .jsonl, .json (a list) and .csv, also with .gz; a picture is a path beside the file,
    a URL, or bytes in a .parquet. Also .tar shards, a folder or a pattern of files, s3:// and other URLs."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER")] = None
    """Where the results of --input go, with all columns of the input: a .parquet, .jsonl or .csv file, or a
    folder of Parquet parts, which may be a URL. A run that was interrupted continues."""
    engine: Literal["local", "ray"] = "local"
    """local is this process; ray is many workers, on the cluster at $RAY_ADDRESS or else on this machine."""
    workers: int | None = None
    """Number of Ray workers, each with one GPU, or one CPU core. By default one a GPU; without GPUs two."""
    rows_per_part: int = 1000
    """Rows between two points at which an interrupted run can continue; also those of a file of a folder."""
    rejects: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Receives the rows without a result, with the reason; absent without any. By default
    OUTPUT.rejects.jsonl. A folder has its own rejects.jsonl."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over where OUTPUT, or a part of it, exists from another run."""
    retry_rejects: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try rows again that an earlier run has rejected, say because missing pictures are there now."""


def run_file(
    options: FileOptions, reward: "ModelOptions", scoring: "Scoring", task: "Task", *, as_json: bool
) -> int:
    """Results of all rows, in a file or a folder."""
    assert options.input is not None
    if options.output is None:
        raise UsageError("--input needs --output FILE.parquet, FILE.jsonl, FILE.csv or FOLDER")
    if options.workers is not None and (options.engine != "ray" or options.workers < 1):
        raise UsageError(f"--workers is at least 1 and goes with --engine ray; got {options.workers}")
    in_folder = is_folder(options.output)
    if in_folder and options.rejects is not None:
        raise UsageError("--rejects goes with a file as --output; a folder has its own rejects.jsonl")
    if options.overwrite and options.retry_rejects:
        raise UsageError("--overwrite does all rows again; leave out --retry-rejects")
    from dina_lrm.scaling.bulk import BulkJob, score_dataset
    from dina_lrm.scaling.joined import score_to_file

    job = BulkJob(
        input=options.input,
        output=options.output,
        reward=reward,
        scoring=scoring,
        task=task,
        rows_per_part=options.rows_per_part,
    )
    common: dict[str, Any] = {
        "workers": options.workers if options.engine == "ray" else 0,
        "overwrite": options.overwrite,
        "retry_rejects": options.retry_rejects,
    }
    found: int | None = None
    with resumable(GO_ON), WorkProgress() as progress:

        def on_progress(done: int, total: int) -> None:
            nonlocal found
            if found is None:
                found = done
                if done:
                    log(f"continuing after {done} of {total} rows")
            progress.tell("rows", done, found, total=total)

        if in_folder:
            summary = score_dataset(job, on_progress=on_progress, **common)
        else:
            summary = score_to_file(job, rejects=options.rejects, on_progress=on_progress, **common)
    if summary.workers_replaced:
        log(f"{summary.workers_replaced} workers died and were replaced")
    record = asdict(summary)
    if as_json:
        print_json(record)
    else:
        columns = ("rows", "scored", "rejected", "output")
        print_table(list(columns), [[str(record[name]) for name in columns]], text_columns=0)
    if summary.rejected:
        log(
            f"{summary.rejected} rows could not be {task.name}d; the reasons are in {summary.rejects}, and "
            "--retry-rejects tries them again"
        )
    if not summary.scored:
        raise InvalidInputError(f"no row of {options.input!r} could be {task.name}d")
    return 0


def is_folder(output: str) -> bool:
    """A name without a suffix, with a slash at its end, or of a folder that is there."""
    return output.endswith("/") or not Path(output).suffix or Path(output).is_dir()


def refuse_file_flags(arguments: Sequence[str]) -> None:
    """Where pictures are named on the command line."""
    refuse(arguments, FLAGS, "goes with --input; results of pictures on the command line are printed")
