"""Results for all rows of a dataset, by this process or by many Ray workers.

The input is cut into parts, fixed ranges of its rows (`sources`). A worker reads a part, scores it and writes
its file, aside and renamed, so that a part is there whole or not at all; doing it twice gives the same file.
That is all there is to exactly one result a row, to workers that die, and to runs that continue: what is
missing is done. Ray Data is not used: its blocks are cut and ordered at run time, so that the files are no
function of the input, and its checkpoints (`CheckpointConfig`) look neither at settings nor at pictures
(`benchmarks/ray_data_checkpoint.py`).

    OUTPUT/manifest.json        input with fingerprints, model, settings: another run is refused
    OUTPUT/part-000000.parquet  row, the input's columns, the results, error; marks of its pictures
    OUTPUT/rejects.jsonl        rows without a result, with the reason; absent without any
    OUTPUT/summary.json         written last, when every row has been found once
    OUTPUT/rows-000000.jsonl    an input file that had to be converted (.csv, .json, .gz)
"""

import json
import os
import socket
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from dina_lrm.errors import DinaError, InvalidInputError, PromptWarning
from dina_lrm.scaling.changes import Marks, changes
from dina_lrm.scaling.cluster import check_device, connected, living_machines, share, whole_path
from dina_lrm.scaling.folder import BulkFolder, BulkSummary, as_json, manifest_of, read_parts, weights_digest
from dina_lrm.scaling.json_rows import converted_lines
from dina_lrm.scaling.places import filesystem
from dina_lrm.scaling.plan import Part, Plan
from dina_lrm.scaling.rows import Result, results_of_rows
from dina_lrm.scaling.settings import BulkJob, Scoring
from dina_lrm.scaling.sources import make_plan, read_part

if TYPE_CHECKING:
    from dina_lrm.models.reward_model import RewardModel

__all__ = ["BulkJob", "Scoring", "score_dataset"]

RETRIES_PER_PART = 3
"""How often a part may bring its worker down before the run gives up."""
SIGN_OF_LIFE_SECONDS = 20.0
"""Longest silence towards `on_progress` while workers are busy."""


@dataclass(frozen=True)
class _PartDone:
    rows: int
    notes: tuple[str, ...]
    """Warnings about prompts."""
    process: str
    """Host and process id."""


def score_dataset(
    job: BulkJob,
    *,
    workers: int | None = 0,
    model: "RewardModel | None" = None,
    overwrite: bool = False,
    retry_rejects: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BulkSummary:
    """Score every row of a dataset, or what an earlier run has left of it.

    Args:
        workers: Ray workers, each with a model of its own, on $RAY_ADDRESS's cluster or on one that is
            started here; None: one a GPU, or two. 0: this process does it, without Ray.
        model: used by this process instead of loading it.
        overwrite: start over where the output is of another run.
        retry_rejects: do the parts with rejects again, say because missing pictures are there now.
        on_progress: told rows done and rows in all: once at the start, then after each batch or part, and
            now and then in between.

    Raises:
        InvalidInputError: an input that cannot be read, an output that belongs to another run, pictures that
            were changed, taken away or supplied since they were scored, more workers than the cluster has
            room for.
        ScoringError: a server with pictures cannot be reached. What was done is kept.
        ChildProcessError: a part has brought its worker down again and again. What was done is kept.
    """
    from dina_lrm.checkpoints.dina import read_checkpoint

    if workers is not None and workers < 0:
        raise InvalidInputError(f"workers = {workers}: must be at least 1, or 0 for this process")
    if workers != 0:
        check_device(job.reward.device)
    folder = BulkFolder(job.output)
    plan = make_plan(job.input, job.rows_per_part, job.output, job.task)
    checkpoint = read_checkpoint(job.reward.model)
    levels = job.scoring.noise_levels or tuple(checkpoint.config.noise_levels)
    job = replace(job, scoring=replace(job.scoring, noise_levels=levels))
    with folder.locked():
        folder.prepare(manifest_of(job, plan, weights_digest(checkpoint)), overwrite)
        for path, name in plan.converted:
            folder.write_stream(name, converted_lines(path))
        kept = _parts_kept(folder, plan, retry_rejects)
        missing = [part for part in plan.parts if part not in kept]
        done = sum(part.rows for part in kept)
        on_progress(done, plan.rows)
        _check_pictures(folder, plan, kept, lambda: on_progress(done, plan.rows))
        processes: dict[int, str] = {}
        replaced, told = 0, set[str]()
        if workers == 0:
            run = _alone(_Scorer(job, plan, model), missing, lambda rows: on_progress(done + rows, plan.rows))
        else:
            run = _with_ray(job, plan, missing, workers, lambda: on_progress(done, plan.rows))
        with closing(run):
            for worker, result in run:
                done += result.rows
                on_progress(done, plan.rows)
                replaced += processes.get(worker, result.process) != result.process
                processes[worker] = result.process
                for note in result.notes:
                    if note not in told:
                        told.add(note)
                        warnings.warn(note, PromptWarning, stacklevel=2)
        done_well, rejected = _check_and_list_rejects(folder, plan)
        summary = BulkSummary(
            rows=plan.rows,
            scored=done_well,
            rejected=rejected,
            output=job.output,
            rejects=folder.location("rejects.jsonl") if rejected else None,
            parts=len(plan.parts),
            parts_found=len(plan.parts) - len(missing),
            workers_replaced=replaced,
        )
        folder.write("summary.json", as_json({"rows": plan.rows, "scored": done_well, "rejected": rejected}))
    return summary


# --- workers -----------------------------------------------------------------------------------------------


class _Scorer:
    """Holds the model and does parts; the model is loaded for the first one."""

    def __init__(self, job: BulkJob, plan: Plan, model: "RewardModel | None" = None) -> None:
        self.job, self.plan = job, plan
        self.folder = BulkFolder(job.output)
        self.fs, _ = filesystem(job.input)
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> "RewardModel":
        return self.job.reward.load()

    def score(self, part: Part, on_rows: Callable[[int], None] = lambda rows: None) -> _PartDone:
        """Read a part, score it, and write its file; tells how many of its rows are done."""
        job, plan = self.job, self.plan
        marks = Marks(self.fs, part)
        tables: list[pyarrow.Table] = []
        results: list[Result] = []
        prompts: dict[str, None] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)  # the notes are returned
            for table, rows in read_part(plan, part, job.scoring.batch_size):
                tables.append(table)
                marks.add(rows)
                found = results_of_rows(self.model, rows, job.scoring, marks.open, job.task)
                prompts |= {
                    row.prompt: None
                    for row, result in zip(rows, found, strict=True)
                    if row.prompt is not None and result["error"] is None
                }
                results += found
                on_rows(len(results))
        notes = self.model.prompt_notes(list(prompts)) if prompts else []
        table = _with_results(pyarrow.concat_tables(tables), part, results, plan)
        table = table.replace_schema_metadata(marks.metadata())
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        self.folder.write(part.name, sink.getvalue().to_pybytes())
        return _PartDone(part.rows, tuple(notes), f"{socket.gethostname()}:{os.getpid()}")


def _with_results(columns: pyarrow.Table, part: Part, results: Sequence[Result], plan: Plan) -> pyarrow.Table:
    numbers = pyarrow.array(range(part.first_row, part.first_row + part.rows), pyarrow.int64())
    table = columns.add_column(0, "row", numbers)
    kinds = dict.fromkeys(plan.task.results, pyarrow.float64()) | {"error": pyarrow.string()}
    for name, kind in kinds.items():
        table = table.append_column(name, pyarrow.array([result[name] for result in results], kind))
    return table


def _alone(
    scorer: _Scorer, parts: Sequence[Part], on_rows: Callable[[int], None]
) -> Generator[tuple[int, _PartDone], None, None]:
    for part in parts:
        yield 0, scorer.score(part, on_rows)


def _with_ray(
    job: BulkJob, plan: Plan, parts: Sequence[Part], workers: int | None, on_wait: Callable[[], None]
) -> Generator[tuple[int, _PartDone], None, None]:
    """Which worker has done a part, part by part. A worker has one part at a time.

    Ray starts a worker that has died again, on another machine if need be, and gives it its part again.
    """
    if not parts:
        return
    pipeline = job.reward.pipeline
    reward = replace(
        job.reward,
        model=whole_path(job.reward.model),
        pipeline=None if pipeline is None else whole_path(pipeline),
    )
    job = replace(job, output=whole_path(job.output), reward=reward)
    with connected() as ray:
        count, on_gpu = share(ray.cluster_resources(), job.reward.device, workers)
        machines = living_machines()
        actor = ray.remote(_Scorer).options(
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=-1,
            max_task_retries=RETRIES_PER_PART,
        )
        free = [
            (number, actor.remote(job, replace(plan, parts=()))) for number in range(min(count, len(parts)))
        ]
        waiting = iter(parts)
        running: dict[Any, tuple[tuple[int, Any], Part]] = {}
        while True:
            while free and (part := next(waiting, None)) is not None:
                worker = free.pop()
                running[worker[1].score.remote(part)] = worker, part
            if not running:
                return
            finished, _ = ray.wait(list(running), timeout=SIGN_OF_LIFE_SECONDS)
            if not finished:
                on_wait()
                continue
            worker, part = running.pop(finished[0])
            try:
                result = ray.get(finished[0])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DinaError | ValueError | OSError):  # says all that there is to say
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError as error:
                if lost := machines - living_machines():
                    raise ChildProcessError(
                        f"Ray has lost {len(lost)} of its {len(machines)} machines, or one of its own "
                        f"processes there, and could not go on ({error})"
                    ) from error
                raise ChildProcessError(
                    f"rows {part.first_row} to {part.first_row + part.rows - 1} of {job.input!r} have "
                    f"brought their worker down {RETRIES_PER_PART + 1} times ({error})"
                ) from error
            except ray.exceptions.RayError as error:
                raise ChildProcessError(f"Ray has failed: {error}") from error
            free.append(worker)
            yield worker[0], result


# --- the output --------------------------------------------------------------------------------------------


def _parts_kept(folder: BulkFolder, plan: Plan, retry_rejects: bool) -> dict[Part, bool]:
    """Parts that are not to be done again, and whether they have rejects."""
    there = folder.names()
    kept: dict[Part, bool] = {}
    for part in plan.parts:
        if part.name in there:
            rejects = read_parts(folder, part, ["error"])["error"]
            kept[part] = rejects.null_count < len(rejects)
    return {part: rejects for part, rejects in kept.items() if not (rejects and retry_rejects)}


def _check_pictures(
    folder: BulkFolder, plan: Plan, kept: Mapping[Part, bool], on_part: Callable[[], None]
) -> None:
    """That those of parts that are kept are as they were."""
    found: list[tuple[str, Part]] = []
    for part in kept:
        metadata = read_parts(folder, part, []).schema.metadata or {}
        try:
            found += [(change, part) for change in changes(plan, part, metadata)]
        except InvalidInputError as error:
            raise InvalidInputError(f"{folder.location(part.name)!r}: {error}") from error
        on_part()
    if not found:
        return
    first, part = found[0]
    more = f", and {len(found) - 1} more are not as they were" if len(found) > 1 else ""
    retry = " --retry-rejects does those rows again;" if all(kept[one] for _, one in found) else ""
    raise InvalidInputError(
        f"{first} since {folder.location(part.name)!r} was made{more}:{retry} put back what was there, or "
        "--overwrite starts over"
    )


def _check_and_list_rejects(folder: BulkFolder, plan: Plan) -> tuple[int, int]:
    """See that every row is there once, and write the rejects down; returns rows scored and rejected."""
    rejects: list[str] = []
    for part in plan.parts:
        table = read_parts(folder, part, ["row", *plan.task.columns, "error"])
        if table["row"].to_pylist() != list(range(part.first_row, part.first_row + part.rows)):
            where = folder.location(part.name)
            raise InvalidInputError(f"{where!r} has other rows than it should: delete it, and repeat the run")
        for reject in table.filter(table["error"].is_valid()).to_pylist():
            rejects.append(json.dumps(reject, ensure_ascii=False) + "\n")
    if rejects:
        folder.write("rejects.jsonl", "".join(rejects).encode())
    elif "rejects.jsonl" in folder.names():  # of a run before, whose rejects were tried again
        folder.remove("rejects.jsonl")
    return plan.rows - len(rejects), len(rejects)
