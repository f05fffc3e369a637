"""`dina-lrm score`: a few images on the command line, or a file of rows of any length.

A file run reads rows, scores them a part at a time and writes each part aside, so that memory does not grow
with the file and an interrupted run continues at the part where it stopped. Every input row is in the output,
in order: one that cannot be scored has no score, a reason in the column `error`, and a line in the rejects
file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dina_lrm.cli.console import UsageError, log, print_json, print_table, progress_bar
from dina_lrm.cli.options import JsonFlag, ModelOptions, NoiseLevels, read_image, scoring_levels
from dina_lrm.files import write_whole

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
    input: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Rows to score: .jsonl or .parquet, columns prompt and image (a path beside the file, or bytes)."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where the scores of --input go: .parquet or .jsonl. A run that was interrupted continues."""
    rejects: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Rows that could not be scored, with the reason. By default OUTPUT.rejects.jsonl; absent without any."""
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
    if options.input is None:
        if options.output is not None:
            raise UsageError("--output goes with --input; images on the command line are printed")
        if not options.prompt.strip() or not options.images:
            raise UsageError(
                'give a prompt and images, as in: dina-lrm score "a red circle" a.png b.png; or --input FILE'
            )
        return score_images(options)
    if options.output is None:
        raise UsageError("--input needs --output FILE.parquet or FILE.jsonl")
    if options.prompt or options.images:
        raise UsageError("--input brings its own prompts and images; leave out the others")
    return score_file(options, options.input, options.output)


# --- images on the command line ----------------------------------------------------------------------------


def score_images(options: Score) -> int:
    images = [read_image(path) for path in options.images]
    model = options.model.load()
    levels = scoring_levels(options.noise_levels, model)
    scores: list[float] = []
    errors: list[float | None] = []
    for start in range(0, len(images), options.batch_size):
        batch = images[start : start + options.batch_size]
        batch_scores, batch_errors = score_batch(model, [options.prompt] * len(batch), batch, levels, options)
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
                    "noise_levels": levels if isinstance(levels, list) else [levels],
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


def score_batch(
    model: "RewardModel", prompts: list[str], images: list[Any], levels: float | list[float], options: Score
) -> tuple[list[float], list[float | None]]:
    """Scores, and standard errors where more than one draw was asked for."""
    output = model.score(
        prompts,
        images,
        noise_levels=levels,
        seed=options.seed,
        num_draws=options.num_draws,
        target_error=options.target_error,
        max_draws=options.max_draws,
    )
    scores = [float(score) for score in output.scores]
    if output.standard_errors is None:
        return scores, [None] * len(scores)
    return scores, [float(error) for error in output.standard_errors]


# --- a file of rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as read. `error` says why it cannot be scored; then `prompt` and `image` may be missing."""

    index: int
    prompt: str | None = None
    image: str | bytes | None = None
    error: str | None = None


def score_file(options: Score, source: Path, target: Path) -> int:
    if not source.is_file():
        raise UsageError(f"no input file {str(source)!r}")
    if target.suffix not in (".parquet", ".jsonl"):
        raise UsageError(f"--output ends in .parquet or .jsonl; got {str(target)!r}")
    num_rows = count_rows(source)
    if num_rows == 0:
        raise UsageError(f"{str(source)!r} holds no rows")
    rejects = options.rejects or target.with_name(target.name + ".rejects.jsonl")
    parts = target.with_name(target.name + ".parts")
    model = options.model.load()
    levels = scoring_levels(options.noise_levels, model)
    settings = {
        "input_sha256": file_digest(source),
        "model": options.model.model,
        "pipeline": options.model.pipeline,
        "dtype": options.model.dtype,
        "noise_levels": levels if isinstance(levels, list) else [levels],
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
                records += score_rows(model, batch, levels, options, root=source.parent)
                progress.advance(task, len(batch))
            write_lines(parts / f"{done:06d}.jsonl", records)
            done += 1
    num_scored, num_rejected = merge_parts(parts, target, rejects)
    shutil.rmtree(parts)
    summary = {
        "rows": num_scored + num_rejected,
        "scored": num_scored,
        "rejected": num_rejected,
        "output": str(target),
        "rejects": str(rejects) if num_rejected else None,
    }
    if options.as_json:
        print_json(summary)
    else:
        print_table(
            ["rows", "scored", "rejected", "output"],
            [[str(summary[k]) for k in ("rows", "scored", "rejected", "output")]],
            text_columns=0,
        )
    if num_rejected:
        log(f"{num_rejected} rows could not be scored; the reasons are in {rejects}")
    if num_scored == 0:
        raise UsageError(f"no row of {str(source)!r} could be scored")
    return 0


def score_rows(
    model: "RewardModel", rows: list[Row], levels: float | list[float], options: Score, *, root: Path
) -> list[dict[str, Any]]:
    """One record a row, in order. A row that the model refuses is found by scoring one at a time."""
    records: list[dict[str, Any]] = []
    good: list[tuple[dict[str, Any], Any]] = []
    for row in rows:
        record: dict[str, Any] = {
            "row": row.index,
            "prompt": row.prompt,
            "image": row.image if isinstance(row.image, str) else None,
            "score": None,
            "standard_error": None,
            "error": row.error,
        }
        records.append(record)
        if row.error is None:
            try:
                good.append((record, open_row_image(row, root)))
            except ValueError as error:
                record["error"] = str(error)

    def fill(batch: list[tuple[dict[str, Any], Any]]) -> None:
        prompts, images = [record["prompt"] for record, _ in batch], [image for _, image in batch]
        scores, errors = score_batch(model, prompts, images, levels, options)
        for (record, _), score, error in zip(batch, scores, errors, strict=True):
            record["score"], record["standard_error"] = score, error

    if good:
        try:
            fill(good)
        except ValueError:
            for item in good:
                try:
                    fill([item])
                except ValueError as error:
                    item[0]["error"] = str(error)
    return records


def open_row_image(row: Row, root: Path) -> Any:
    if not row.prompt or not row.prompt.strip():
        raise ValueError("the prompt is empty")
    if isinstance(row.image, str):
        return read_image(Path(row.image), root=root)
    from dina_lrm.data.pairs import load_image

    assert row.image is not None
    return load_image(row.image)


def count_rows(source: Path) -> int:
    if source.suffix == ".parquet":
        return open_parquet(source).metadata.num_rows
    if source.suffix != ".jsonl":
        raise UsageError(f"--input ends in .jsonl or .parquet; got {str(source)!r}")
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


def parse_row(index: int, record: Any) -> Row:
    """A row from its columns; `image` is a path, bytes, or the struct of both that Hugging Face datasets
    write.

    >>> parse_row(3, {"prompt": "a red circle", "image": {"bytes": None, "path": "a.png"}})
    Row(index=3, prompt='a red circle', image='a.png', error=None)
    >>> parse_row(4, {"prompt": "a red circle"}).error
    'image is missing'
    """
    if not isinstance(record, dict):
        return Row(
            index=index, error=f"a row is an object with prompt and image; got {type(record).__name__}"
        )
    prompt, image = record.get("prompt"), record.get("image")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    error = None
    for name, value, kinds in (("prompt", prompt, str), ("image", image, (str, bytes))):
        if value is None:
            error = error or f"{name} is missing"
        elif not isinstance(value, kinds):
            error = error or f"{name} has type {type(value).__name__}"
    return Row(
        index=index,
        prompt=prompt if isinstance(prompt, str) else None,
        image=image if isinstance(image, str | bytes) else None,
        error=error,
    )


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
