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

import hashlib
import json
import os
import posixpath
import re
import socket
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pyarrow
import pyarrow.parquet

from dina_lrm.errors import DinaError, InvalidInputError, PromptWarning
from dina_lrm.files import write_whole, written_aside
from dina_lrm.scaling.changes import Marks, changes
from dina_lrm.scaling.cluster import check_device, connected, living_machines, share, whole_path
from dina_lrm.scaling.places import filesystem, is_local
from dina_lrm.scaling.rows import Result, results_of_rows
from dina_lrm.scaling.settings import BulkJob, Scoring
from dina_lrm.scaling.sources import Part, Plan, converted_lines, make_plan, read_part

if TYPE_CHECKING:
    from dina_lrm.checkpoints.contents import Checkpoint
    from dina_lrm.models.reward_model import RewardModel

__all__ = ["BulkFolder", "BulkJob", "BulkSummary", "Scoring", "score_dataset"]

FORMAT = "dina-lrm scores"
FORMAT_VERSION = 2
RETRIES_PER_PART = 3
"""How often a part may bring its worker down before the run gives up."""
SIGN_OF_LIFE_SECONDS = 20.0
"""Longest silence towards `on_progress` while workers are busy."""


@dataclass(frozen=True)
class BulkSummary:
    """How a run has ended."""

    rows: int
    scored: int
    rejected: int
    output: str
    rejects: str | None
    """None: there are no rejects."""
    parts: int
    parts_found: int
    """Parts that an earlier run had done."""
    workers_replaced: int
    """Workers that died on the way."""


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
        folder.prepare(_manifest(job, plan, _weights_digest(checkpoint)), overwrite)
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
        folder.write("summary.json", _json({"rows": plan.rows, "scored": done_well, "rejected": rejected}))
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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            for table, rows in read_part(plan, part, job.scoring.batch_size):
                tables.append(table)
                marks.add(rows)
                results += results_of_rows(self.model, rows, job.scoring, marks.open, job.task)
                on_rows(len(results))
        notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, PromptWarning))
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


class BulkFolder:
    """The output. A file in it is there whole or not at all: renamed into place, as object stores do it
    themselves."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.path = filesystem(url)
        self.is_local = is_local(self.fs)

    def location(self, name: str) -> str:
        return posixpath.join(self.url, name)

    def locked(self) -> AbstractContextManager[Any]:
        """One run at a time, where files can be locked."""
        if not self.is_local:
            return nullcontext()
        Path(self.path).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(Path(self.path) / ".lock")
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InvalidInputError(f"another run is writing to {self.url!r}") from error

    def names(self) -> set[str]:
        try:
            self.fs.invalidate_cache()
            return {posixpath.basename(str(name)) for name in self.fs.ls(self.path, detail=False)}
        except FileNotFoundError:
            return set()

    def write(self, name: str, content: bytes) -> None:
        if self.is_local:
            write_whole(Path(self.path) / name, content)
        else:
            self.fs.pipe_file(posixpath.join(self.path, name), content)

    def write_stream(self, name: str, lines: Iterable[bytes]) -> None:
        if self.is_local:
            with written_aside(Path(self.path) / name) as aside, aside.open("wb") as file:
                file.writelines(lines)
        else:
            with self.fs.open(posixpath.join(self.path, name), "wb") as file:
                for line in lines:
                    file.write(line)  # pyright: ignore[reportArgumentType]

    def open(self, name: str) -> Any:
        return self.fs.open(posixpath.join(self.path, name), "rb")

    def remove(self, name: str) -> None:
        self.fs.rm_file(posixpath.join(self.path, name))

    def prepare(self, manifest: dict[str, Any], overwrite: bool) -> None:
        """Make the folder this run's, or check that it is."""
        found = self.names() - {".lock"}
        if "manifest.json" not in found:
            if found:
                raise InvalidInputError(
                    f"{self.url!r} holds other files, such as {min(found)!r}: give a new folder"
                )
        elif overwrite:
            for name in found:
                if _OURS.fullmatch(name) and name != "manifest.json":
                    self.remove(name)
        else:
            with self.open("manifest.json") as file:
                there = json.load(file)
            if different := sorted(key for key in manifest if there.get(key) != manifest[key]):
                raise InvalidInputError(
                    f"{self.url!r} is of a run with another {', '.join(different)}; repeat that run's "
                    "options, or --overwrite"
                )
            for name in found:
                if name.endswith(".partial"):  # of a worker that was killed
                    self.remove(name)
            return
        self.write("manifest.json", _json(manifest))


_OURS = re.compile(
    r"(part-\d{6,}\.parquet|rows-\d{6,}\.jsonl|summary\.json|rejects\.jsonl|manifest\.json)(\.\d+\.partial)?"
)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _manifest(job: BulkJob, plan: Plan, weights: str) -> dict[str, Any]:
    """What the results depend on, and how they are cut into files."""
    files = [asdict(file) | {"path": posixpath.basename(file.path)} for file in plan.files]
    settings = asdict(job.scoring) | {"noise_levels": list(job.scoring.noise_levels)}
    del settings["batch_size"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "input": files,
        "rows_per_part": job.rows_per_part,
        "task": job.task.name,
        "model": job.reward.model,
        "weights_sha256": weights,
        "pipeline": job.reward.pipeline,
        "dtype": job.reward.dtype,
        **settings,
    }


def _weights_digest(checkpoint: "Checkpoint") -> str:
    """Digest of what was trained: the same name may stand for other weights tomorrow."""
    import torch

    digest = hashlib.sha256()
    for tensors in (checkpoint.head, checkpoint.logistic, checkpoint.adapter, checkpoint.backbone):
        for name, tensor in sorted((tensors or {}).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts_kept(folder: BulkFolder, plan: Plan, retry_rejects: bool) -> dict[Part, bool]:
    """Parts that are not to be done again, and whether they have rejects."""
    there = folder.names()
    kept: dict[Part, bool] = {}
    for part in plan.parts:
        if part.name in there:
            rejects = _read(folder, part, ["error"])["error"]
            kept[part] = rejects.null_count < len(rejects)
    return {part: rejects for part, rejects in kept.items() if not (rejects and retry_rejects)}


def _check_pictures(
    folder: BulkFolder, plan: Plan, kept: Mapping[Part, bool], on_part: Callable[[], None]
) -> None:
    """That those of parts that are kept are as they were."""
    found: list[tuple[str, Part]] = []
    for part in kept:
        metadata = _read(folder, part, []).schema.metadata or {}
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


def _read(folder: BulkFolder, part: Part, columns: list[str]) -> pyarrow.Table:
    try:
        with folder.open(part.name) as file:
            return pyarrow.parquet.read_table(file, columns=columns)
    except pyarrow.ArrowException as error:
        where = folder.location(part.name)
        raise InvalidInputError(f"{where!r} is damaged: delete it, and repeat the run") from error


def _check_and_list_rejects(folder: BulkFolder, plan: Plan) -> tuple[int, int]:
    """See that every row is there once, and write the rejects down; returns rows scored and rejected."""
    rejects: list[str] = []
    for part in plan.parts:
        table = _read(folder, part, ["row", *plan.task.columns, "error"])
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
