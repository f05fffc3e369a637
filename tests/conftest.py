"""Shared fixtures: the folder of golden tensors, and tiny random pipelines built once a session."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.families import make_family
from tests.reference import GOLDEN
from tests.tiny import make_tiny_pipeline, tiny_transformer_only

# Some libraries warn about themselves while being imported. Importing them here, once and quietly, leaves
# "warnings are errors" in force for what the tests do.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

# A shell's background job ignores SIGINT, and the commands that the tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers wait for everybody else

torch.set_num_threads(max(1, min(2, torch.get_num_threads())))


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command that logs as a server does leaves no handler behind: its stderr belongs to one test."""
    loggers = [logging.getLogger(name) for name in ("dina_lrm.serving", "uvicorn.error", "asyncio")]
    before = [(one, one.handlers, one.propagate, one.level) for one in loggers]
    yield
    for one, handlers, propagate, level in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def golden() -> Path:
    """See `tests.reference`."""
    if not (GOLDEN / "A_lora_dual").is_dir():
        pytest.skip(f"no golden tensors at {GOLDEN}: set DINA_LRM_GOLDEN to their folder")
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete pipeline folder. Shared by all tests: do not change it, see `tests.tiny.copy_of`."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformer/ and scheduler/ only."""
    return tiny_transformer_only(tmp_path_factory.mktemp("tiny") / "backbone")


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A complete pipeline folder of each backbone family, by its name in `tests.families.FAMILIES`."""

    @cache
    def folder(family: str) -> Path:
        return make_family(family, tmp_path_factory.mktemp("family") / family)

    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs are long, whatever each of them takes."""
    tests = Path(__file__).parent
    for item in items:
        if {tests / "trajectory", tests / "end_to_end"} & set(item.path.parents):
            item.add_marker("long")
