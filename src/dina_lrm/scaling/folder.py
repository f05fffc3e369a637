"""The folder of a bulk run: parts, manifest, results."""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pyarrow.parquet

from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path, atomic_write
from dina_lrm.scaling.places import filesystem, is_local
from dina_lrm.scaling.plan import Part, Plan
from dina_lrm.scaling.settings import BulkJob

if TYPE_CHECKING:
    from dina_lrm.checkpoints.contents import Checkpoint


__all__ = ["BulkFolder", "BulkSummary", "as_json", "manifest_of", "read_parts", "weights_digest"]

FORMAT = "dina-lrm scores"
FORMAT_VERSION = 2


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
            atomic_write(Path(self.path) / name, content)
        else:
            self.fs.pipe_file(posixpath.join(self.path, name), content)

    def write_stream(self, name: str, lines: Iterable[bytes]) -> None:
        if self.is_local:
            with atomic_path(Path(self.path) / name) as aside, aside.open("wb") as file:
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
        self.write("manifest.json", as_json(manifest))


_OURS = re.compile(
    r"(part-\d{6,}\.parquet|rows-\d{6,}\.jsonl|summary\.json|rejects\.jsonl|manifest\.json)(\.\d+\.partial)?"
)


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def manifest_of(job: BulkJob, plan: Plan, weights: str) -> dict[str, Any]:
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


def weights_digest(checkpoint: "Checkpoint") -> str:
    """Digest of what was trained: the same name may stand for other weights tomorrow."""
    import torch

    digest = hashlib.sha256()
    for tensors in (checkpoint.head, checkpoint.logistic, checkpoint.adapter, checkpoint.backbone):
        for name, tensor in sorted((tensors or {}).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_parts(folder: BulkFolder, part: Part, columns: list[str]) -> pyarrow.Table:
    try:
        with folder.open(part.name) as file:
            return pyarrow.parquet.read_table(file, columns=columns)
    except pyarrow.ArrowException as error:
        where = folder.location(part.name)
        raise InvalidInputError(f"{where!r} is damaged: delete it, and repeat the run") from error
