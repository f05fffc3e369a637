"""diffusers and transformers: their classes by name, and their advice kept off the terminal."""

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dina_lrm.pipelines.threads import library_lock


def diffusers_class(name: str) -> Any:
    """A class of diffusers, imported by one thread at a time.

    Some of its pipelines ask transformers for image processors that have a second form without torchvision,
    which is the one that serves here: the warning about it helps nobody.
    """
    with library_lock, _quiet("transformers.utils.import_utils", lambda message: "torchvision" in message):
        # Not by an import statement: diffusers replaces its module at the end of its own import, and a
        # thread that waited for somebody else's import would be handed the one without names.
        return getattr(importlib.import_module("diffusers"), name)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of the libraries while small files load, and no other thread that loads.

    Whoever has set HF_HUB_DISABLE_PROGRESS_BARS=0 wants the bars, and gets them.
    """
    with library_lock:
        import diffusers.utils.logging
        import huggingface_hub.constants
        import transformers.utils.logging

        if huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
            yield
            return

        sources = (diffusers.utils.logging, transformers.utils.logging)
        shown = [source.is_progress_bar_enabled() for source in sources]
        try:
            for source in sources:
                source.disable_progress_bar()
            yield
        finally:
            for source, enabled in zip(sources, shown, strict=True):
                if enabled:
                    source.enable_progress_bar()


@contextlib.contextmanager
def quiet_tokenizing(pipeline: Any) -> Iterator[None]:
    """diffusers and transformers log truncation too (for T5 with the wrong words): once, by us, is enough."""
    with contextlib.ExitStack() as stack:
        for name in (type(pipeline).__module__, "transformers.tokenization_utils_base"):
            stack.enter_context(_quiet(name, lambda message: True))
        yield


@contextlib.contextmanager
def _quiet(logger: str, unwanted: Callable[[str], bool]) -> Iterator[None]:
    """Drop messages of a logger that this thread causes; those of other threads still come out."""
    thread = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread != thread or not unwanted(record.getMessage())

    logging.getLogger(logger).addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(wanted)
