"""Scores of a whole dataset, by this process or by many Ray workers.

The input is cut into parts, fixed ranges of its rows (`sources`). A worker reads a part, scores it and writes
its file, aside and renamed, so that a part is there whole or not at all; doing it twice gives the same file.
That is all there is to exactly one result a row, to workers that die, and to runs that continue: what is
missing is done. Ray Data is not used: its blocks are cut and ordered at run time, so that neither the files
nor what is left to do would be a function of the input.

    OUTPUT/manifest.json        input with fingerprints, model, settings: another run is refused
    OUTPUT/part-000000.parquet  row, the input's columns, score, standard_error, error
    OUTPUT/rejects.jsonl        rows without a score, with the reason; absent without any
    OUTPUT/summary.json         written last, when every row has been found once
"""

import hashlib
import json
import os
import posixpath
import re
import socket
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock
import pyarrow
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from dina_lrm.errors import InvalidInputError, PromptWarning
from dina_lrm.files import write_whole
from dina_lrm.scaling.cluster import check_device, connected, share, whole_path
from dina_lrm.scaling.rows import Scoring, score_rows
from dina_lrm.scaling.sources import Part, Plan, filesystem, make_plan, open_file, read_part

if TYPE_CHECKING:
    from dina_lrm.models.checkpoint import Checkpoint
    from dina_lrm.models.reward_model import RewardModel

__all__ = ["BulkJob", "BulkSummary", "score_dataset"]

FORMAT = "dina-lrm scores"
FORMAT_VERSION = 1
RETRIES_PER_PART = 3
"""How often a part may bring its worker down before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class BulkJob:
    """What is to be scored, with what, and where the scores go."""

    input: str
    """A .parquet, .jsonl or .tar file, a folder of them, or a pattern; a path or a URL such as s3://."""
    output: str
    """Folder; a path or a URL."""
    model: str = "bundled"
    pipeline: str | None = None
    device: str = "auto"
    """"auto": a GPU where there are any. Workers on GPUs have one each, whatever its number."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    noise_levels: tuple[float, ...] | None = None
    """None: the checkpoint's."""
    num_draws: int = 1
    target_error: float | None = None
    max_draws: int = 64
    seed: int = 0
    batch_size: int = 16
    rows_per_part: int = 1000
    """Also what is lost, at most, when a worker dies."""

    def __post_init__(self) -> None:
        for name in ("num_draws", "batch_size", "rows_per_part"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be at least 1")


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
    """Of an earlier run."""
    workers_replaced: int
    """That died on the way."""


@dataclass(frozen=True)
class _PartDone:
    rows: int
    notes: tuple[str, ...]
    """Warnings about prompts."""
    process: str
    """That has done it: host and process id."""


def score_dataset(
    job: BulkJob,
    *,
    workers: int | None = 0,
    model: "RewardModel | None" = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BulkSummary:
    """Score every row of a dataset, or what an earlier run has left of it.

    Args:
        workers: Ray workers, each with a model of its own, on $RAY_ADDRESS's cluster or on one that is
            started here; None: one a GPU, or two. 0: this process does it, without Ray.
        model: used by this process instead of loading it.
        overwrite: start over where the output is of another run.
        on_progress: told rows done and rows in all: once at the start, then after each part.

    Raises:
        InvalidInputError: an input that cannot be read, an output that belongs to another run, more workers
            than the cluster has room for.
        ChildProcessError: a part has brought its worker down again and again. What was done is kept.
    """
    from dina_lrm.models.checkpoint import read_checkpoint

    if workers is not None and workers < 0:
        raise InvalidInputError(f"workers = {workers}: must be at least 1, or 0 for this process")
    if workers != 0:
        check_device(job.device)
    plan = make_plan(job.input, job.rows_per_part)
    checkpoint = read_checkpoint(job.model)
    scoring = Scoring(
        noise_levels=job.noise_levels or tuple(checkpoint.config.noise_levels),
        num_draws=job.num_draws,
        target_error=job.target_error,
        max_draws=job.max_draws,
        seed=job.seed,
        batch_size=job.batch_size,
    )
    folder = _Folder(job.output)
    with folder.locked():
        folder.prepare(_manifest(job, plan, scoring, _weights_digest(checkpoint)), overwrite)
        there = folder.names()
        missing = [part for part in plan.parts if part.name not in there]
        done = plan.rows - sum(part.rows for part in missing)
        on_progress(done, plan.rows)
        processes: dict[int, str] = {}
        replaced, told = 0, set[str]()
        if workers == 0:
            run = _alone(_Scorer(job, scoring, plan, model), missing)
        else:
            run = _with_ray(job, scoring, plan, missing, workers)
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
        scored, rejected = _check_and_list_rejects(folder, plan)
        summary = BulkSummary(
            rows=plan.rows,
            scored=scored,
            rejected=rejected,
            output=job.output,
            rejects=folder.location("rejects.jsonl") if rejected else None,
            parts=len(plan.parts),
            parts_found=len(plan.parts) - len(missing),
            workers_replaced=replaced,
        )
        folder.write("summary.json", _json({"rows": plan.rows, "scored": scored, "rejected": rejected}))
    return summary


# --- workers -----------------------------------------------------------------------------------------------


class _Scorer:
    """Holds the model and does parts; the model is loaded for the first one."""

    def __init__(
        self, job: BulkJob, scoring: Scoring, plan: Plan, model: "RewardModel | None" = None
    ) -> None:
        self.job, self.scoring, self.plan = job, scoring, plan
        self.folder = _Folder(job.output)
        self.fs, _ = filesystem(job.input)
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> "RewardModel":
        import torch

        from dina_lrm.models.reward_model import RewardModel

        job = self.job
        device = job.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        # Only what was asked for is passed on: the defaults belong to from_pretrained.
        options: dict[str, Any] = {} if job.pipeline is None else {"pipeline": job.pipeline}
        return RewardModel.from_pretrained(
            job.model, device=device, dtype=getattr(torch, job.dtype), **options
        )

    def score(self, part: Part) -> _PartDone:
        """Read a part, score it, and write its file."""
        open_picture = partial(open_file, fs=self.fs, folder=posixpath.dirname(part.path))
        tables: list[pyarrow.Table] = []
        records: list[dict[str, Any]] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            for table, rows in read_part(self.plan, part, self.scoring.batch_size):
                tables.append(table)
                records += score_rows(self.model, rows, self.scoring, open_picture)
        notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, PromptWarning))
        self.folder.write(part.name, _parquet(pyarrow.concat_tables(tables), records))
        return _PartDone(part.rows, tuple(notes), f"{socket.gethostname()}:{os.getpid()}")


def _parquet(columns: pyarrow.Table, records: Sequence[dict[str, Any]]) -> bytes:
    table = columns.add_column(
        0, "row", pyarrow.array([record["row"] for record in records], pyarrow.int64())
    )
    for name, kind in (
        ("score", pyarrow.float64()),
        ("standard_error", pyarrow.float64()),
        ("error", pyarrow.string()),
    ):
        table = table.append_column(name, pyarrow.array([record[name] for record in records], kind))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _alone(scorer: _Scorer, parts: Sequence[Part]) -> Generator[tuple[int, _PartDone], None, None]:
    for part in parts:
        yield 0, scorer.score(part)


def _with_ray(
    job: BulkJob, scoring: Scoring, plan: Plan, parts: Sequence[Part], workers: int | None
) -> Generator[tuple[int, _PartDone], None, None]:
    """Which worker has done a part, part by part. A worker has one part at a time.

    Ray starts a worker that has died again, on another machine if need be, and gives it its part again.
    """
    if not parts:
        return
    job = replace(
        job,
        output=whole_path(job.output),
        model=whole_path(job.model),
        pipeline=None if job.pipeline is None else whole_path(job.pipeline),
    )
    with connected() as ray:
        count, on_gpu = share(ray.cluster_resources(), job.device, workers)
        actor = ray.remote(_Scorer).options(
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=-1,
            max_task_retries=RETRIES_PER_PART,
        )
        free = [
            (number, actor.remote(job, scoring, replace(plan, parts=())))
            for number in range(min(count, len(parts)))
        ]
        waiting = iter(parts)
        running: dict[Any, tuple[tuple[int, Any], Part]] = {}
        while True:
            while free and (part := next(waiting, None)) is not None:
                worker = free.pop()
                running[worker[1].score.remote(part)] = worker, part
            if not running:
                return
            finished, _ = ray.wait(list(running))
            worker, part = running.pop(finished[0])
            try:
                result = ray.get(finished[0])
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ValueError | OSError):  # says all that there is to say
                    raise error.cause from None
                raise
            except ray.exceptions.RayActorError as error:
                raise ChildProcessError(
                    f"rows {part.first_row} to {part.first_row + part.rows - 1} of {job.input!r} have "
                    f"brought their worker down {RETRIES_PER_PART + 1} times; what was done is kept ({error})"
                ) from error
            free.append(worker)
            yield worker[0], result


# --- the output --------------------------------------------------------------------------------------------


class _Folder:
    """The output. A file in it is there whole or not at all: renamed into place, as object stores do it
    themselves."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.path = filesystem(url)
        self.is_local = isinstance(self.fs, LocalFileSystem)

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
                    "options, or overwrite it"
                )
            for name in found:
                if name.endswith(".partial"):  # of a worker that was killed
                    self.remove(name)
            return
        self.write("manifest.json", _json(manifest))


_OURS = re.compile(r"(part-\d{6,}\.parquet|summary\.json|rejects\.jsonl|manifest\.json)(\.\d+\.partial)?")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _manifest(job: BulkJob, plan: Plan, scoring: Scoring, weights: str) -> dict[str, Any]:
    """What the scores depend on, and how they are cut into files."""
    files = [
        {"name": posixpath.basename(file.path), "rows": file.rows, "bytes": file.bytes, "sha256": file.sha256}
        for file in plan.files
    ]
    settings = asdict(scoring) | {"noise_levels": list(scoring.noise_levels)}
    del settings["batch_size"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "input": files,
        "rows_per_part": job.rows_per_part,
        "model": job.model,
        "weights_sha256": weights,
        "pipeline": job.pipeline,
        "dtype": job.dtype,
        **settings,
    }


def _weights_digest(checkpoint: "Checkpoint") -> str:
    """Of what was trained: the same name may stand for other weights tomorrow."""
    import torch

    digest = hashlib.sha256()
    for tensors in (checkpoint.head, checkpoint.logistic, checkpoint.adapter, checkpoint.backbone):
        for name, tensor in sorted((tensors or {}).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_and_list_rejects(folder: _Folder, plan: Plan) -> tuple[int, int]:
    """See that every row is there once, and write the rejects down; returns rows scored and rejected."""
    rejects: list[str] = []
    for part in plan.parts:
        where = folder.location(part.name)
        try:
            with folder.open(part.name) as file:
                table = pyarrow.parquet.read_table(file, columns=["row", "prompt", "image", "error"])
        except pyarrow.ArrowException as error:
            raise InvalidInputError(f"{where!r} is damaged: delete it, and repeat the run") from error
        if table["row"].to_pylist() != list(range(part.first_row, part.first_row + part.rows)):
            raise InvalidInputError(f"{where!r} has other rows than it should: delete it, and repeat the run")
        for reject in table.filter(table["error"].is_valid()).to_pylist():
            rejects.append(json.dumps(reject, ensure_ascii=False) + "\n")
    if rejects:
        folder.write("rejects.jsonl", "".join(rejects).encode())
    return plan.rows - len(rejects), len(rejects)
