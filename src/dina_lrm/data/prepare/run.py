"""From a source of comparisons to latent shards, in several processes, in the same bytes whatever happens.

The stream of the source is cut into parts of `pairs_per_shard` comparisons, in order. A part is one task and
gives one file, which appears whole; what is in it depends on the part and the settings alone. So it does not
matter how many processes there are or how often they are stopped: files that are there are not made again,
and the last run ends with the same bytes as one that was never stopped. Prompts follow when all parts are
there, each encoded once, and the manifest comes last.

What a run goes on with has to be what it was begun with: the digests of the source's files are settings, and
a part keeps the digests of its pictures, which are read again before the run goes on.
"""

import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import torch
from torch import Tensor

from dina_lrm.data.buckets import Size, needs_padding, pair_bucket, place
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import (
    ImageSource,
    Reject,
    StoredLatent,
    image_name,
    image_size,
    load_image,
    reasons,
    write_rejects,
)
from dina_lrm.data.prepare.settings import LoadEncoder, PairEncoder, Prepared, PrepareSettings
from dina_lrm.data.shards.columns import shard_pictures, shard_prompts, shard_rejects
from dina_lrm.data.shards.write import FORMAT, PromptRow, prompt_hash, write_pairs, write_prompts
from dina_lrm.data.sources.own_rows import TIE
from dina_lrm.errors import InvalidInputError, PromptWarning, RunError
from dina_lrm.files import content_digest, write_whole
from dina_lrm.images import rgb_tensor

__all__ = ["prepare", "unwanted"]

PICTURES_PER_CALL = 16
PROMPTS_PER_CALL = 16
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
        with _processes(self.load_encoder, self.devices, self.root) as pool:
            shards = self._make("pairs", pool, _make_shard, _cut(stream, size))
            self._need_pairs(shards)
            num_cut = 0
            tables: list[Path] = []
            if self.settings.embeddings:
                tables = self._make(
                    "prompts", pool, _make_prompts, _cut(self._prompts(shards), PROMPTS_PER_FILE)
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
                with _signals_held():  # which a process that is started here inherits
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
        write_whole(self.output / "README.md", card.encode())
        manifest = {"format": FORMAT, "settings": asdict(self.settings), "counts": counts, "digests": digests}
        write_whole(self.output / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
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
        write_whole(file, (json.dumps(asdict(settings), indent=1) + "\n").encode())
        return
    try:
        before = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{file} is damaged: {error}") from error
    now = json.loads(json.dumps(asdict(settings)))
    _check_files(file.parent, before.pop("files", {}), now.pop("files"))
    differing = [
        f"{one.name} was {_short(before.get(one.name))} and is {_short(now[one.name])}"
        for one in fields(settings)
        if before.get(one.name) != now.get(one.name)
    ]
    if differing:
        raise InvalidInputError(f"{file.parent} was begun with other settings: {'; '.join(differing)}")


def _short(value: Any) -> str:
    """A setting as a message shows it; what holds digests is not written out."""
    return "other weights or files" if isinstance(value, Mapping) else repr(value)


def _check_files(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Of the source."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            what = "is new" if name not in before else "is gone" if name not in now else "has changed"
            raise InvalidInputError(
                f"{name} {what} since {output} was begun: prepare into another folder, or delete that one"
            )


def unwanted(
    item: Comparison, *, ties: Literal["reject", "half"], min_confidence: float | None
) -> str | None:
    """Why a comparison is not asked for, or None."""
    if item.pair.tie and ties == "reject":
        return TIE
    if min_confidence is not None and item.confidence is not None and item.confidence < min_confidence:
        return f"confidence: {item.confidence:g} is under {min_confidence:g}"
    return None


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


@dataclass
class _Worker:
    """What a process holds."""

    encoder: PairEncoder
    device: torch.device
    root: Path
    """Pictures are named relative to it."""


_worker: _Worker | None = None


@contextlib.contextmanager
def _processes(
    load_encoder: LoadEncoder, devices: Sequence[str], root: Path
) -> Iterator[ProcessPoolExecutor]:
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    # One process imports the libraries, and all others have them from it.
    source = load_encoder.func if isinstance(load_encoder, functools.partial) else load_encoder
    context.set_forkserver_preload([source.__module__, "diffusers.models", "transformers.models.auto"])
    names = context.SimpleQueue()
    for device in devices:
        names.put(device)
    pool = ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_start_worker, initargs=(load_encoder, names, root)
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        # A part takes long, and what of it is done is lost anyway.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)
        raise


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block has ended. The parent alone answers them, and ends its
    processes: a terminal sends Ctrl-C to all."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(load_encoder: LoadEncoder, names: Any, root: Path) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = names.get()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    _worker = _Worker(load_encoder(device), torch.device(device), root)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _make_shard(items: Sequence[Comparison | Reject], file: Path, settings: PrepareSettings) -> int:
    assert _worker is not None
    _Shard(items, settings, _worker).write(file)
    return 0


def _make_prompts(prompts: Sequence[str], file: Path, settings: PrepareSettings) -> int:
    """Returns how many prompts the encoders warned about."""
    assert _worker is not None
    rows: list[PromptRow] = []
    warned: set[str] = set()
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        some = prompts[start : start + PROMPTS_PER_CALL]
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always", PromptWarning)
            conditioning = _worker.encoder.encode_prompts(some, _worker.device)
        warned |= {str(one.message) for one in told if issubclass(one.category, PromptWarning)}
        rows += prompt_rows(conditioning)
    write_prompts(file, prompts, rows, dtype=getattr(torch, settings.prompt_dtype))
    return len(warned)


def prompt_rows(conditioning: Any) -> list[PromptRow]:
    """One row a prompt, on the CPU, without the padding at its end."""
    mask, pooled = conditioning.attention_mask, conditioning.pooled_prompt_embeds
    rows = []
    for index, embeds in enumerate(conditioning.prompt_embeds.detach().float().cpu()):
        own = None if mask is None else mask[index].cpu().long()
        length = len(embeds) if own is None else int(own.nonzero().max()) + 1
        rows.append(
            PromptRow(
                prompt_embeds=embeds[:length],
                pooled_prompt_embeds=None if pooled is None else pooled[index].detach().float().cpu(),
                attention_mask=None if own is None else own[:length],
            )
        )
    return rows


# --- one shard ---------------------------------------------------------------------------------------------


class _Shard:
    """A part of the stream on its way to a file. Every item ends as a row or as a reject."""

    def __init__(
        self, items: Sequence[Comparison | Reject], settings: PrepareSettings, worker: _Worker
    ) -> None:
        self.items, self.settings, self.worker = items, settings, worker
        self.rejects: dict[int, Reject] = {}
        self.sizes: dict[ImageSource, Size | str] = {}
        self.digests: dict[ImageSource, str | None] = {}

    def write(self, file: Path) -> None:
        wanted: dict[Size, list[int]] = {}
        stored: list[int] = []
        for index, item in enumerate(self.items):
            if isinstance(item, Reject):
                self.rejects[index] = item
                continue
            asked = {"ties": self.settings.ties, "min_confidence": self.settings.min_confidence}
            if (fault := unwanted(item, **asked)) is not None:
                self._reject(index, fault)
            elif isinstance(item.pair.chosen, StoredLatent):
                stored.append(index)
            else:
                bucket = self._bucket(item)
                if isinstance(bucket, str):
                    self._reject(index, bucket)
                else:
                    wanted.setdefault(bucket, []).append(index)
        by_shape: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for bucket in sorted(wanted):
            for row in self._encoded(bucket, wanted[bucket]):
                by_shape.setdefault(tuple(row["latent_shape"]), []).append(row)
        for row in self._stored(stored):
            by_shape.setdefault(tuple(row["latent_shape"]), []).append(row)
        size = self.settings.pairs_per_row_group
        groups = [
            by_shape[shape][start : start + size]
            for shape in sorted(by_shape)
            for start in range(0, len(by_shape[shape]), size)
        ]
        rejects = [asdict(self.rejects[index]) for index in sorted(self.rejects)]
        pictures = {self._name(one): digest for one, digest in self.digests.items() if isinstance(one, Path)}
        write_pairs(file, groups, rejects=rejects, num_items=len(self.items), pictures=pictures)

    def _reject(self, index: int, reason: str) -> None:
        self.rejects[index] = self._comparison(index).reject(reason)

    def _bucket(self, item: Comparison) -> Size | str:
        """Size of both sides, or what is wrong."""
        pair = item.pair
        sizes = [self._size(side) for side in (pair.chosen, pair.rejected)]
        for size in sizes:
            if isinstance(size, str):
                return size
        if self.digests[pair.chosen] == self.digests[pair.rejected]:  # both have a size, so both were read
            return f"same picture: on both sides, {self._name(pair.chosen)}"
        first, second = (size for size in sizes if not isinstance(size, str))
        bucket = pair_bucket(first, second)
        if self.settings.mixed_sizes == "reject" and any(needs_padding(s, bucket) for s in (first, second)):
            return f"aspect ratios differ: {first[1]}x{first[0]} and {second[1]}x{second[0]}"
        return bucket

    def _size(self, image: ImageSource) -> Size | str:
        if image not in self.sizes:
            # Before it is decoded: if it is replaced meanwhile, the next run finds another digest.
            match image:
                case Path():
                    self.digests[image] = content_digest(image)
                case bytes():
                    self.digests[image] = hashlib.sha256(image).hexdigest()
            try:
                height, width = image_size(image)
                self.sizes[image] = self.worker.encoder.picture_size(height, width)
            except InvalidInputError as error:
                self.sizes[image] = self._reason(image, error)
        return self.sizes[image]

    def _encoded(self, bucket: Size, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of the pairs of one bucket; every picture is encoded once."""
        sides: dict[ImageSource, None] = {}
        for index in indices:
            pair = self._comparison(index).pair
            sides |= dict.fromkeys((pair.chosen, pair.rejected))
        latents: dict[ImageSource, np.ndarray | str] = {}
        images = list(sides)
        for start in range(0, len(images), PICTURES_PER_CALL):
            pictures: dict[ImageSource, Tensor] = {}
            for image in images[start : start + PICTURES_PER_CALL]:
                try:
                    own = self._size(image)
                    assert not isinstance(own, str)
                    pictures[image] = place(rgb_tensor(load_image(image)), bucket, own)
                except InvalidInputError as error:
                    latents[image] = self._reason(image, error)
            if not pictures:
                continue
            with torch.no_grad():
                encoded = self.worker.encoder.encode_images(list(pictures.values()), self.worker.device)
            for image, latent in zip(pictures, encoded, strict=True):
                half = latent.cpu().to(torch.float16)
                finite = bool(torch.isfinite(half).all())
                latents[image] = half.numpy() if finite else f"latent is not finite: {self._name(image)}"
        for index in indices:
            pair = self._comparison(index).pair
            yield from self._row(index, latents[pair.chosen], latents[pair.rejected])

    def _stored(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows of pairs that come as latents."""
        for index in indices:
            pair, sides = self._comparison(index).pair, []
            for side in (pair.chosen, pair.rejected):
                assert isinstance(side, StoredLatent)
                try:
                    half = side.array().astype(np.float16)
                    sides.append(half if np.isfinite(half).all() else "latent is not finite: in float16")
                except InvalidInputError as error:
                    sides.append(str(error))
            shapes = {side.shape for side in sides if not isinstance(side, str)}
            if len(shapes) > 1:
                sides[0] = f"latents differ in shape: {sorted(shapes)}"
            yield from self._row(index, *sides)

    def _row(
        self, index: int, chosen: np.ndarray | str, rejected: np.ndarray | str
    ) -> Iterator[dict[str, Any]]:
        for side in (chosen, rejected):
            if isinstance(side, str):
                self._reject(index, side)
                return
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        item = self._comparison(index)
        pair = item.pair
        yield {
            "prompt": pair.prompt,
            "prompt_hash": prompt_hash(pair.prompt),
            "target": pair.target,
            "votes_chosen": pair.votes_chosen,
            "votes_rejected": pair.votes_rejected,
            "confidence": item.confidence,
            "source": pair.source,
            "file": item.file,
            "row": item.row,
            "chosen": self._name(pair.chosen),
            "rejected": self._name(pair.rejected),
            "latent_shape": list(chosen.shape),
            "latents_chosen": np.ascontiguousarray(chosen).tobytes(),
            "latents_rejected": np.ascontiguousarray(rejected).tobytes(),
        }

    def _reason(self, image: ImageSource, error: InvalidInputError) -> str:
        """With the picture's name from the root; what it is too small for is said under one heading."""
        text = str(error).replace(str(image), self._name(image)) if isinstance(image, Path) else str(error)
        known = text.startswith(("missing file", "no file", "unreadable image", "no picture"))
        return text if known else f"size: {self._name(image)}: {text}"

    def _name(self, image: ImageSource) -> str:
        if isinstance(image, Path):
            root = self.worker.root
            return image_name(image.relative_to(root) if image.is_relative_to(root) else image)
        if isinstance(image, StoredLatent):
            return image.name
        assert isinstance(image, bytes)
        return f"sha256:{hashlib.sha256(image).hexdigest()[:32]}"

    def _comparison(self, index: int) -> Comparison:
        item = self.items[index]
        assert isinstance(item, Comparison)
        return item
