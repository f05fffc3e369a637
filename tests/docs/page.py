"""The page whose blocks are being run: its folder, its servers, and what stands in for what."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.docs.background import Background

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class StandIn:
    page: str
    line: int
    wanted: str
    """What the reader has, such as a hub id or a file of their own."""
    given: str
    """What the page is run with instead."""


STAND_INS: list[StandIn] = []
"""Of all pages so far, in the order in which they were needed."""


@dataclass
class Page:
    """A folder in which the blocks of one page are run, one after another, as by a reader."""

    folder: Path
    patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)
    addresses: dict[str, str] = field(default_factory=dict)
    """What the page calls a server, such as 127.0.0.1:8000, and where it listens here."""
    servers: dict[str, Background] = field(default_factory=dict)
    """By the address on the page."""
    output: str = ""
    """What the commands of the latest shell block printed on stdout."""
    block: str = ""
    """The latest block of json, yaml or toml."""
    closing: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def open(cls) -> "Page":
        page = cls(Path(tempfile.mkdtemp(prefix="page-")).resolve())
        page.patch.chdir(page.folder)
        page.patch.setenv("HOME", str(page.folder))
        page.patch.delenv("DINA_LRM_TOKEN", raising=False)
        return page

    def close(self) -> None:
        self.patch.undo()
        for finish in reversed(self.closing):
            finish()
        ended = {address: server.stop() for address, server in self.servers.items()}
        shutil.rmtree(self.folder, ignore_errors=True)
        # 143: it answered, and was still starting its other replicas.
        failed = {address: code for address, code in ended.items() if code not in (0, 143)}
        assert not failed, f"servers that did not end with 0 at SIGTERM: {failed}"

    def here(self, text: str) -> str:
        """The text with the addresses at which the page's servers listen here."""
        for there, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.]){re.escape(there)}(?!\d)", address, text)
        return text

    def serve(self, address: str, server: Background) -> None:
        """A server takes the place of the one that the page had at this address."""
        if address in self.servers:
            assert self.servers.pop(address).stop() == 0, f"the server at {address} failed at SIGTERM"
        self.servers[address] = server


_open: list[Page] = []


def setup(namespace: dict[str, Any]) -> None:
    """Before the first block of a page."""
    del namespace
    _open.append(Page.open())


def teardown(namespace: dict[str, Any]) -> None:
    """After the last one."""
    namespace.clear()
    _open.pop().close()


def current() -> Page:
    """The page that is being run."""
    return _open[-1]


def declare(wanted: str, given: str, *, where: tuple[str, int] | None = None) -> None:
    """Note a stand-in; `where` is the page and line, by default that of the block that is being run."""
    file, line = _calling_block() if where is None else where
    STAND_INS.append(StandIn(os.path.relpath(file, ROOT), line, wanted, given))


def _calling_block() -> tuple[str, int]:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith(".md"):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    raise AssertionError("stand-ins are declared in a page's blocks")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The page's environment variables, with some more."""
    return {**os.environ, **(extra or {})}
