"""`dina-lrm score`: a few images on the command line, or a file of rows of any length.

A file run reads rows, scores them a part at a time and writes each part aside, so that memory does not grow
with the file and an interrupted run continues at the part where it stopped. Every input row is in the output,
in order: one that cannot be scored has no score, a reason in the column `error`, and a line in the rejects
file. With a folder as output, `scaling.bulk` does the same for datasets of many files, with one process or
many.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table, progress_bar
from dina_lrm.cli.options import JsonFlag, ModelOptions, NoiseLevels, read_image
from dina_lrm.files import write_whole
from dina_lrm.scaling.rows import Row, Scoring, parse_row, score_batch, score_rows

if TYPE_CHECKING:
    import pyarrow.parquet

    from dina_lrm import RewardModel

ROWS_PER_PART = 512
"""Rows between two points at which an interrupted run can continue."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score images against a prompt, or every row of a file.

    A score has no unit: compare scores of one prompt, from one model, at the same noise levels.
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """What the images should show. Not with --input."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Files."""
    input: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER|URL")] = None
    """Rows to score: .jsonl or .parquet, columns prompt and image (a path beside the file, or bytes). With a
    folder as --output also .tar shards, a folder or pattern of files, s3:// and other URLs."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE|FOLDER")] = None
    """Where the scores of --input go: a .parquet or .jsonl file, or a folder of Parquet parts, which may be a
    URL. A run that was interrupted continues."""
    engine: Literal["local", "ray"] = "local"
    """Who scores: this process, or Ray workers on $RAY_ADDRESS's cluster, or else on this machine."""
    workers: int | None = None
    """Ray workers, each with one GPU, or one CPU core. By default one a GPU; without GPUs two."""
    rows_per_part: int = 1000
    """Rows in a file of a folder; also what is lost, at most, when a worker dies."""
    rejects: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Rows that could not be scored, with the reason. By default OUTPUT.rejects.jsonl; absent without any. A
    folder has its own rejects.jsonl."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over where OUTPUT, or a part of it, exists from another run."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    noise_levels: NoiseLevels = ()
    """0 is clean, 1 is pure noise; several are one ensemble; auto: the model's own."""
    num_draws: int = 1
    """Noise draws to average over; more than one gives a standard error."""
    target_error: float | None = None
    """Draw as often as each picture needs for this standard error: from 5 to --max-draws times."""
    max_draws: int = 64
    """Read only with --target-error."""
    seed: int = 0
    """Of the noise. A sample's score depends on its seed, not on what is scored beside it."""
    batch_size: int = 16
    """Images in memory at once."""
    as_json: JsonFlag = False
    """Print one JSON object a line: per image, or one summary for --input."""


def main(arguments: Sequence[str]) -> int:
    options = tyro.cli(Score, prog="dina-lrm score", args=arguments)
    for name in ("num_draws", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is at least 1; got {getattr(options, name)}")
    if options.target_error is not None and not (options.target_error > 0 and options.max_draws >= 2):
        raise UsageError(
            f"--target-error is above 0 and --max-draws at least 2; got {options.target_error:g} "
            f"and {options.max_draws}"
        )
    if options.workers is not None and (options.engine != "ray" or options.workers < 1):
        raise UsageError(f"--workers is at least 1 and goes with --engine ray; got {options.workers}")
    if options.input is None:
        if options.output is not None:
            raise UsageError("--output goes with --input; images on the command line are printed")
        if not options.prompt.strip() or not options.images:
            raise UsageError(
                'give a prompt and images, as in: dina-lrm score "a red circle" a.png b.png; or --input FILE'
            )
        return score_images(options)
    if options.output is None:
        raise UsageError("--input needs --output FILE.parquet, FILE.jsonl or FOLDER")
    if options.prompt or options.images:
        raise UsageError("--input brings its own prompts and images; leave out the others")
    if is_folder(options.output):
        return score_to_folder(options, options.input, options.output)
    if options.engine == "ray":
        raise UsageError(f"--engine ray writes a folder of parts; {options.output!r} is a file's name")
    return score_file(options, Path(options.input), Path(options.output))


# --- images on the command line ----------------------------------------------------------------------------


def score_images(options: Score) -> int:
    images = [read_image(path) for path in options.images]
    model = options.model.load()
    scoring = scoring_of(options, model)
    scores: list[float] = []
    errors: list[float | None] = []
    for start in range(0, len(images), options.batch_size):
        batch = images[start : start + options.batch_size]
        batch_scores, batch_errors = score_batch(model, [options.prompt] * len(batch), batch, scoring)
        scores += batch_scores
        errors += batch_errors
    if options.as_json:
        for path, score, error in zip(options.images, scores, errors, strict=True):
            print_json(
                {
                    "prompt": options.prompt,
                    "image": str(path),
                    "score": score,
                    "standard_error": error,
                    "noise_levels": list(scoring.noise_levels),
                    "seed": options.seed,
                    "model": options.model.model,
                }
            )
        return 0
    ranks = {
        index: rank
        for rank, index in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), start=1)
    }
    rows = [
        (
            str(path),
            f"{scores[i]:+.3f}" + ("" if (error := errors[i]) is None else f" ± {error:.3f}"),
            str(ranks[i]),
        )
        for i, path in enumerate(options.images)
    ]
    print_table(["image", "score", "rank"], rows, title=options.prompt)
    return 0


# --- a file of rows ----------------------------------------------------------------------------------------


def score_file(options: Score, source: Path, target: Path) -> int:
    if not source.is_file():
        raise UsageError(f"no input file {str(source)!r}; folders and URLs need a folder as --output")
    if target.suffix not in (".parquet", ".jsonl"):
        raise UsageError(f"--output ends in .parquet or .jsonl, or is a folder; got {str(target)!r}")
    num_rows = count_rows(source)
    if num_rows == 0:
        raise UsageError(f"{str(source)!r} holds no rows")
    rejects = options.rejects or target.with_name(target.name + ".rejects.jsonl")
    parts = target.with_name(target.name + ".parts")
    model = options.model.load()
    scoring = scoring_of(options, model)
    settings = {
        "input_sha256": file_digest(source),
        "model": options.model.model,
        "pipeline": options.model.pipeline,
        "dtype": options.model.dtype,
        "noise_levels": list(scoring.noise_levels),
        "num_draws": options.num_draws,
        "target_error": options.target_error,
        "max_draws": options.max_draws,
        "seed": options.seed,
        "rows_per_part": ROWS_PER_PART,
    }
    if options.overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    elif target.exists():
        raise UsageError(f"{str(target)!r} exists; choose another --output, or --overwrite")
    prepare_parts(parts, settings)
    done = continue_from(parts)
    if done:
        log(f"continuing after {min(done * ROWS_PER_PART, num_rows)} of {num_rows} rows")
    rows = islice(read_rows(source), done * ROWS_PER_PART, None)
    with progress_bar("rows") as progress:
        task = progress.add_task("scoring", total=num_rows, completed=min(done * ROWS_PER_PART, num_rows))
        while part := list(islice(rows, ROWS_PER_PART)):
            records: list[dict[str, Any]] = []
            for start in range(0, len(part), options.batch_size):
                batch = part[start : start + options.batch_size]
                records += score_rows(model, batch, scoring, lambda name: source.parent / name)
                progress.advance(task, len(batch))
            write_lines(parts / f"{done:06d}.jsonl", records)
            done += 1
    num_scored, num_rejected = merge_parts(parts, target, rejects)
    shutil.rmtree(parts)
    show_summary(
        options,
        {
            "rows": num_scored + num_rejected,
            "scored": num_scored,
            "rejected": num_rejected,
            "output": str(target),
            "rejects": str(rejects) if num_rejected else None,
        },
    )
    return 0


def score_to_folder(options: Score, source: str, target: str) -> int:
    """Into a folder of parts, by this process or by Ray workers."""
    from dina_lrm.scaling.bulk import BulkJob, score_dataset

    if options.rejects is not None:
        raise UsageError("--rejects goes with a file as --output; a folder has its own rejects.jsonl")
    job = BulkJob(
        input=source,
        output=target,
        model=options.model.model,
        pipeline=options.model.pipeline,
        device=options.model.device,
        dtype=options.model.dtype,
        noise_levels=options.noise_levels or None,
        num_draws=options.num_draws,
        target_error=options.target_error,
        max_draws=options.max_draws,
        seed=options.seed,
        batch_size=options.batch_size,
        rows_per_part=options.rows_per_part,
    )
    with_ray = options.engine == "ray"
    with progress_bar("rows") as progress:
        task = progress.add_task("scoring", total=None)
        told: int | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal told
            if told is None and done:
                log(f"continuing after {done} of {total} rows")
            if told is None or 20 * (done - told) >= total:
                if told is not None and progress.disable:
                    log(f"  {done:,} of {total:,} rows")
                told = done
            progress.update(task, completed=done, total=total)

        summary = score_dataset(
            job,
            workers=options.workers if with_ray else 0,
            model=None if with_ray else options.model.load(),
            overwrite=options.overwrite,
            on_progress=on_progress,
        )
    if summary.workers_replaced:
        log(f"{summary.workers_replaced} workers died and were replaced")
    show_summary(options, asdict(summary))
    return 0


def show_summary(options: Score, summary: dict[str, Any]) -> None:
    """Of a run with --input, which has failed where nothing could be scored."""
    if options.as_json:
        print_json(summary)
    else:
        print_table(
            ["rows", "scored", "rejected", "output"],
            [[str(summary[k]) for k in ("rows", "scored", "rejected", "output")]],
            text_columns=0,
        )
    if summary["rejected"]:
        log(f"{summary['rejected']} rows could not be scored; the reasons are in {summary['rejects']}")
    if not summary["scored"]:
        raise UsageError(f"no row of {options.input!r} could be scored")


def scoring_of(options: Score, model: "RewardModel") -> Scoring:
    return Scoring(
        noise_levels=options.noise_levels or tuple(model.config.noise_levels),
        num_draws=options.num_draws,
        target_error=options.target_error,
        max_draws=options.max_draws,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def is_folder(output: str) -> bool:
    """A name without a suffix, with a slash at its end, or of a folder that is there."""
    return output.endswith("/") or not Path(output).suffix or Path(output).is_dir()


def count_rows(source: Path) -> int:
    if source.suffix == ".parquet":
        return open_parquet(source).metadata.num_rows
    if source.suffix != ".jsonl":
        raise UsageError(
            f"--input ends in .jsonl or .parquet; got {str(source)!r}; shards need a folder as --output"
        )
    with source.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def open_parquet(source: Path) -> "pyarrow.parquet.ParquetFile":
    import pyarrow

    from dina_lrm.data import rows

    try:
        file = rows.open_parquet(source)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{str(source)!r} is not a Parquet file: {error}") from error
    missing = {"prompt", "image"} - set(file.schema_arrow.names)
    if missing:
        raise UsageError(
            f"{str(source)!r} has no column {', '.join(sorted(missing))}; it has {file.schema_arrow.names}"
        )
    return file


def read_rows(source: Path) -> Iterator[Row]:
    """The rows of a file in order, one at a time; blank lines of a .jsonl file are no rows."""
    if source.suffix == ".parquet":
        index = 0
        for batch in open_parquet(source).iter_batches(batch_size=64, columns=["prompt", "image"]):
            for record in batch.to_pylist():
                yield parse_row(index, record)
                index += 1
        return
    with source.open(encoding="utf-8", errors="replace") as lines:
        for index, line in enumerate(line for line in lines if line.strip()):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                yield Row(index=index, error=f"not JSON: {error}")
            else:
                yield parse_row(index, record)


# --- parts: what makes a run resumable ---------------------------------------------------------------------


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_parts(parts: Path, settings: dict[str, Any]) -> None:
    """Make the folder of parts, or check that the one there belongs to the same run."""
    file = parts / "settings.json"
    if file.is_file():
        found = json.loads(file.read_text())
        different = sorted(key for key in settings if found.get(key) != settings[key])
        if different:
            raise UsageError(
                f"{str(parts)!r} is left from an unfinished run with another {', '.join(different)}; "
                "repeat that run's options, or --overwrite"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    write_lines(file, [settings])


def continue_from(parts: Path) -> int:
    """How many parts are complete: a part is renamed into place only when all of it is written."""
    done = 0
    while (parts / f"{done:06d}.jsonl").is_file():
        done += 1
    return done


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_whole(path, "".join(lines).encode())


def merge_parts(parts: Path, target: Path, rejects: Path) -> tuple[int, int]:
    """Join the parts into the output and list the rejects; returns how many rows were scored and rejected."""
    num_scored = num_rejected = 0
    aside, rejects_aside = (path.with_name(path.name + ".tmp") for path in (target, rejects))
    rejects.parent.mkdir(parents=True, exist_ok=True)
    with open_sink(aside, target.suffix) as write, rejects_aside.open("w", encoding="utf-8") as rejected:
        for path in sorted(parts.glob("[0-9]*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines]
            write(records)
            for record in records:
                if record["error"] is None:
                    num_scored += 1
                else:
                    num_rejected += 1
                    reject = {key: record[key] for key in ("row", "prompt", "image", "error")}
                    rejected.write(json.dumps(reject, ensure_ascii=False) + "\n")
    aside.replace(target)
    if num_rejected:
        rejects_aside.replace(rejects)
    else:
        rejects_aside.unlink()
        rejects.unlink(missing_ok=True)
    return num_scored, num_rejected


@contextmanager
def open_sink(path: Path, suffix: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that appends records to a Parquet or JSON lines file."""
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            yield lambda records: file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        return
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("row", pyarrow.int64()),
            ("prompt", pyarrow.string()),
            ("image", pyarrow.string()),
            ("score", pyarrow.float64()),
            ("standard_error", pyarrow.float64()),
            ("error", pyarrow.string()),
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        yield lambda records: writer.write_table(pyarrow.Table.from_pylist(records, schema=schema))
