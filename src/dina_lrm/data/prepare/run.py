"""From a source of comparisons to latent shards, in several processes, in the same bytes whatever happens.

The stream of the source is cut into parts of `pairs_per_shard` comparisons, in order. A part is one task and
gives one file, which appears whole; what is in it depends on the part and the settings alone. So it does not
matter how many processes there are or how often they are stopped: files that are there are not made again,
and the last run ends with the same bytes as one that was never stopped. Prompts follow when all parts are
there, each encoded once, and the manifest comes last.

What a run goes on with has to be what it was begun with: the digests of the source's files are settings, and
a part keeps the digests of its pictures, which are read again before the run goes on.
"""

import errno
import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import filelock

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import (
    Reject,
    reasons,
    write_rejects,
)
from dina_lrm.data.prepare.settings import LoadEncoder, Prepared, PrepareSettings
from dina_lrm.data.prepare.workers import make_prompts, make_shard, process_pool, signals_held
from dina_lrm.data.shards.columns import shard_pictures, shard_prompts, shard_rejects
from dina_lrm.data.shards.write import FORMAT, prompt_hash
from dina_lrm.errors import InvalidInputError, RunError
from dina_lrm.files import atomic_write, content_digest

__all__ = ["prepare"]

PROMPTS_PER_FILE = 512
READERS = 8
"""Threads that read pictures again."""


def prepare(
    stream: Iterable[Comparison | Reject],
    output: Path,
    load_encoder: LoadEncoder,
    settings: PrepareSettings,
    *,
    root: Path,
    devices: Sequence[str] = ("cpu",),
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """Write `output`, or go on with it.

    Args:
        stream: from `read_source(..., check_images="none")`; the same every time.
        root: pictures are named relative to this folder.
        devices: of the processes, one each; a CPU process works on one thread, so that bytes do not depend on
            how many there are.
        on_progress: called with "checks" (finished parts whose pictures were read again), "pairs" or
            "prompts", how many are done, and how many of these were found done.

    Raises:
        InvalidInputError: the folder belongs to other settings; a file of the source or a picture has changed
            since it was begun; another process works on it; no pair can be used.
        RunError: a process died; what was finished is kept.
        OSError: the disk is full; what was finished is kept.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InvalidInputError(f"another process is preparing {output}") from error
    try:
        return _Preparation(output, settings, load_encoder, root, devices, on_progress).run(stream)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        hint = "make room and run the same command again, it goes on where it stopped"
        raise OSError(errno.ENOSPC, f"no space left on the disk of {output}: {hint}") from error
    finally:
        lock.release()


class _Preparation:
    """The state of one call of `prepare`."""

    def __init__(
        self,
        output: Path,
        settings: PrepareSettings,
        load_encoder: LoadEncoder,
        root: Path,
        devices: Sequence[str],
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.output, self.settings, self.load_encoder, self.root = output, settings, load_encoder, root
        self.devices, self.on_progress = devices, on_progress
        _check_settings(output / "prepare.json", settings)
        for folder in (output / "pairs", output / "prompts", output):
            folder.mkdir(exist_ok=True)
            for partial in folder.glob("*.partial"):  # of a run that was killed
                partial.unlink()

    def run(self, stream: Iterable[Comparison | Reject]) -> Prepared:
        size = self.settings.pairs_per_shard
        self._check_pictures()
        with process_pool(self.load_encoder, self.devices, self.root) as pool:
            shards = self._make("pairs", pool, make_shard, _cut(stream, size))
            self._need_pairs(shards)
            num_cut = 0
            tables: list[Path] = []
            if self.settings.embeddings:
                tables = self._make(
                    "prompts", pool, make_prompts, _cut(self._prompts(shards), PROMPTS_PER_FILE)
                )
                num_cut = self.num_cut
        return self._finish(shards, tables, num_cut)

    def _check_pictures(self) -> None:
        """A picture that was replaced since its part was made would make the folder a mixture of both."""
        parts = sorted((self.output / "pairs").glob("part-*.parquet"))
        changed: list[str] = []
        readers = ThreadPoolExecutor(READERS)
        try:
            for number, part in enumerate(parts, start=1):
                before = shard_pictures(part)
                now = readers.map(content_digest, [self.root / name for name in before])
                changed += [name for name, digest in zip(before, now, strict=True) if digest != before[name]]
                self._tell("checks", number, 0)
        finally:
            readers.shutdown(cancel_futures=True)
        if changed:
            number = len(set(changed))
            raise InvalidInputError(
                f"{changed[0]}{f' and {number - 1:,} other pictures' if number > 1 else ''} changed since "
                f"{self.output} was begun: put back what was there, or prepare into another folder"
            )

    def _need_pairs(self, shards: Sequence[Path]) -> None:
        """Where there is no pair, only the list of rejects stays, so that the folder can be used again."""
        import pyarrow.parquet as parquet

        if any(parquet.read_metadata(shard).num_rows for shard in shards):
            return
        found = [shard_rejects(shard) for shard in shards]
        rejects = [Reject(**reject) for own, _ in found for reject in own]
        shutil.rmtree(self.output / "pairs")
        (self.output / "prepare.json").unlink()
        if not rejects:
            files = ", ".join(list(self.settings.files)[:3])
            raise InvalidInputError(f"no pair to prepare: {self.settings.source} ({files}) holds no rows")
        write_rejects(rejects, self.output / "rejects.jsonl")
        raise InvalidInputError(
            f"no pair to prepare: none of {len(rejects):,} comparisons can be used{reasons(rejects)}. "
            f"All are listed in {self.output / 'rejects.jsonl'}"
        )

    def _prompts(self, shards: Sequence[Path]) -> Iterator[str]:
        """Distinct prompts of all pairs, in order of appearance."""
        seen: set[str] = set()
        for shard in shards:
            for prompt in shard_prompts(shard):
                key = prompt_hash(prompt)
                if key not in seen:
                    seen.add(key)
                    yield prompt

    def _make(
        self,
        kind: str,
        pool: ProcessPoolExecutor,
        task: Callable[..., int],
        parts: Iterable[list[Any]],
    ) -> list[Path]:
        """One file a part, in the order of the parts; at most two tasks a process wait at a time."""
        files: list[Path] = []
        running: deque[tuple[Future[int], int]] = deque()
        done = found = self.num_cut = 0

        def collect() -> None:
            nonlocal done
            future, count = running.popleft()
            self.num_cut += future.result()
            done += count
            self._tell(kind, done, found)

        try:
            for index, part in enumerate(parts):
                file = self.output / kind / f"part-{index:05d}.parquet"
                files.append(file)
                if file.exists():
                    done, found = done + len(part), found + len(part)
                    self._tell(kind, done, found)
                    continue
                with signals_held():  # which a process that is started here inherits
                    future = pool.submit(task, part, file, self.settings)
                running.append((future, len(part)))
                while len(running) >= 2 * len(self.devices):
                    collect()
            while running:
                collect()
        except BrokenProcessPool as error:
            raise RunError(
                "a process of `prepare` died, perhaps for lack of memory (fewer --processes need less); "
                "what was finished is kept: run the same command again"
            ) from error
        surplus = sorted(set((self.output / kind).glob("part-*.parquet")) - set(files))
        if surplus:
            raise InvalidInputError(
                f"{self.output / kind} holds files of another run, first: {surplus[0].name}"
            )
        return files

    def _tell(self, kind: str, done: int, found: int) -> None:
        if self.on_progress is not None:
            self.on_progress(kind, done, found)

    def _finish(self, shards: Sequence[Path], tables: Sequence[Path], num_cut: int) -> Prepared:
        """Rejects, the card, and the manifest, which says that the folder is complete."""
        import pyarrow.parquet as parquet

        rejects: list[Reject] = []
        num_items = num_pairs = 0
        buckets: Counter[str] = Counter()
        digests: dict[str, str] = {}
        for shard in shards:
            own, items = shard_rejects(shard)
            rejects += [Reject(**reject) for reject in own]
            num_items += items
            shapes = parquet.read_table(shard, columns=["latent_shape"]).column(0).to_pylist()
            num_pairs += len(shapes)
            buckets.update("x".join(map(str, shape)) for shape in shapes)
        for file in (*shards, *tables):
            with file.open("rb") as content:
                name = file.relative_to(self.output).as_posix()
                digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
        if num_pairs + len(rejects) != num_items:
            raise RunError(
                f"{num_items} items, but {num_pairs} pairs and {len(rejects)} rejects: a fault of ours"
            )
        prepared = Prepared(
            num_items=num_items,
            num_pairs=num_pairs,
            rejects=dict(Counter(reject.reason.split(":")[0] for reject in rejects).most_common()),
            num_prompts=sum(parquet.read_metadata(table).num_rows for table in tables)
            if tables
            else len(list(self._prompts(shards))),
            num_cut_prompts=num_cut,
            buckets=dict(buckets.most_common()),
            num_bytes=sum(file.stat().st_size for file in (*shards, *tables)),
        )
        write_rejects(rejects, self.output / "rejects.jsonl")
        counts = {key: value for key, value in asdict(prepared).items() if key != "num_cut_prompts"}
        card = _card(self.settings, prepared)
        atomic_write(self.output / "README.md", card.encode())
        manifest = {"format": FORMAT, "settings": asdict(self.settings), "counts": counts, "digests": digests}
        atomic_write(self.output / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        return prepared


def _check_settings(file: Path, settings: PrepareSettings) -> None:
    """A folder holds the shards of one set of settings; the first run writes them down."""
    if not file.exists():
        names = sorted(one.name for one in file.parent.iterdir()) if file.parent.is_dir() else []
        own = (".lock", "pairs", "prompts", "rejects.jsonl")
        if others := [name for name in names if name not in own and not name.endswith(".partial")]:
            raise InvalidInputError(
                f"{file.parent} holds {others[0]!r} and nothing of `dina-lrm prepare`: choose another output"
            )
        atomic_write(file, (json.dumps(asdict(settings), indent=1) + "\n").encode())
        return
    try:
        before = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{file} is damaged: {error}") from error
    now = json.loads(json.dumps(asdict(settings)))
    _check_files(file.parent, before.pop("files", {}), now.pop("files"))
    differing = [
        f"{field.name} was {_short(before.get(field.name))} and is {_short(now[field.name])}"
        for field in fields(settings)
        if before.get(field.name) != now.get(field.name)
    ]
    if differing:
        raise InvalidInputError(f"{file.parent} was begun with other settings: {'; '.join(differing)}")


def _short(value: Any) -> str:
    """A setting as a message shows it; what holds digests is not written out."""
    return "other weights or files" if isinstance(value, Mapping) else repr(value)


def _check_files(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a source whose files have changed."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "is new" if name not in before else "is gone" if name not in now else "has changed"
            raise InvalidInputError(
                f"{name} {what} since {output} was begun: prepare into another folder, or delete that one"
            )


def _cut(stream: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(stream)
    while part := list(islice(items, size)):
        yield part


def _card(settings: PrepareSettings, prepared: Prepared) -> str:
    """README.md, with the header by which `datasets` finds the files."""
    configs = ["pairs", *(["prompts"] if settings.embeddings else [])]
    header = ["---", "configs:"]
    for name in configs:
        header += [f"- config_name: {name}", f"  data_files: {name}/part-*.parquet"]
    lines = [
        *header,
        "---",
        "",
        f"# Latents of {settings.source}" + (f", {settings.split}" if settings.split else ""),
        "",
        f"{prepared.num_pairs:,} preference pairs of {prepared.num_prompts:,} prompts, encoded with the VAE",
        f"of {settings.pipeline} ({settings.latent_space}) by `dina-lrm prepare`.",
        f"{sum(prepared.rejects.values()):,} of {prepared.num_items:,} comparisons could not be used;",
        "`rejects.jsonl` says which and why.",
        "",
        "| latent shape | pairs |",
        "|---|--:|",
        *(f"| {shape} | {count:,} |" for shape, count in prepared.buckets.items()),
        "",
        "Latents are shifted and scaled, float16, in C order:",
        '`np.frombuffer(row["latents_chosen"], np.float16).reshape(row["latent_shape"])`.',
        "",
    ]
    return "\n".join(lines)


# --- processes ---------------------------------------------------------------------------------------------


# --- one shard ---------------------------------------------------------------------------------------------
