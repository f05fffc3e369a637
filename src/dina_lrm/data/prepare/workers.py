"""Processes of a preparation, each with the encoders; shards are their tasks."""

import contextlib
import functools
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject
from dina_lrm.data.prepare.settings import LoadEncoder, PrepareSettings
from dina_lrm.data.prepare.shard import PROMPTS_PER_CALL, Shard, Worker, prompt_rows
from dina_lrm.data.shards.write import PromptRow, write_prompts

_worker: Worker | None = None


@contextlib.contextmanager
def process_pool(
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
def signals_held() -> Iterator[None]:
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
    _worker = Worker(load_encoder(device), torch.device(device), root)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def make_shard(items: Sequence[Comparison | Reject], file: Path, settings: PrepareSettings) -> int:
    assert _worker is not None
    Shard(items, settings, _worker).write(file)
    return 0


def make_prompts(prompts: Sequence[str], file: Path, settings: PrepareSettings) -> int:
    """Returns how many prompts the encoders do not see all of."""
    assert _worker is not None
    rows: list[PromptRow] = []
    noted = 0
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        some = prompts[start : start + PROMPTS_PER_CALL]
        with torch.no_grad():
            conditioning = _worker.encoder.encode_prompts(some, _worker.device)
        noted += sum(bool(_worker.encoder.prompt_notes([prompt], _worker.device)) for prompt in some)
        rows += prompt_rows(conditioning)
    write_prompts(file, prompts, rows, dtype=getattr(torch, settings.prompt_dtype))
    return noted
