"""Runs the blocks of README.md and of the pages under docs/, through Sybil.

    python -m pytest -o addopts= -p tests.docs.pages [-n 2 --dist loadfile] README.md docs

Names flow from block to block, and every page has a folder of its own. A block has a language: python and
shell are run, console shows what a command prints, json, yaml and toml are parsed, text is not code. What
only stands in for something that a reader has, such as weights on the hub, is set up in invisible blocks of
the page's source by `tests.docs.stand_ins`, and listed at the end of the run.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import astuple
from typing import Any

import pytest
import yaml
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from tests.docs import page
from tests.docs.background import start_fork_server
from tests.docs.shell import COMMAND_SECONDS, run_console, run_shell

TOLERANCE = 0.02
"""Scores that a page prints were computed on some machine; relative, and for numbers below 1 absolute."""


class _Python(PythonEvaluator):
    """A block as a reader would run it, at the addresses of the page's servers."""

    def __call__(self, example: Example) -> None:
        source = example.parsed
        example.parsed = type(source)(page.current().here(source), source.offset, source.line_offset)
        super().__call__(example)


def _json(example: Example) -> str | None:
    """JSON, or a JSON object a line; after a command that printed JSON, what it printed."""
    shown = _documents(_text(example))
    output, page.current().output = page.current().output, ""
    try:
        printed = _documents(output)
    except ValueError:
        return None
    return _difference(shown, printed) if printed else None


def _documents(text: str) -> list[Any]:
    try:
        return [json.loads(text)] if text.strip() else []
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _difference(shown: Any, printed: Any, path: str = "") -> str | None:
    if isinstance(shown, dict) and isinstance(printed, dict) and shown.keys() == printed.keys():
        parts = [_difference(shown[key], printed[key], f"{path}.{key}") for key in shown]
        return next(filter(None, parts), None)
    if isinstance(shown, list) and isinstance(printed, list) and len(shown) == len(printed):
        pairs = enumerate(zip(shown, printed, strict=True))
        parts = [_difference(*pair, f"{path}[{index}]") for index, pair in pairs]
        return next(filter(None, parts), None)
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (shown, printed))
    if shown == printed or (numbers and abs(shown - printed) <= TOLERANCE * max(1, abs(printed))):
        return None
    return f"the page shows {path or 'it'} as {shown!r}, the command printed {printed!r}"


def _yaml(example: Example) -> None:
    yaml.safe_load(_text(example))


def _toml(example: Example) -> None:
    tomllib.loads(_text(example))


def _text(example: Example) -> str:
    """The block, kept for a page that puts it into a file."""
    page.current().block = str(example.parsed)
    return page.current().block


EVALUATORS: dict[str, Callable[[Example], str | None]] = {
    "python": _Python(),
    "shell": run_shell,
    "console": run_console,
    "json": _json,
    "yaml": _yaml,
    "toml": _toml,
    "text": lambda example: None,
}


class _Unknown:
    """Blocks without a language that is known: none is passed over in silence."""

    lexer = RawFencedCodeBlockLexer(
        info_pattern=re.compile(r"(?P<language>[^\n]*)$\n", re.MULTILINE),
        mapping={"language": "language", "source": "source"},
    )

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in self.lexer(document):
            language = region.lexemes["language"]
            if language not in EVALUATORS:
                yield Region(region.start, region.end, language, self.refuse)

    @staticmethod
    def refuse(example: Example) -> str:
        return f"a block of language {str(example.parsed)!r}; there are {', '.join(EVALUATORS)}"


PAGES = Sybil(
    parsers=[
        *(CodeBlockParser(language, evaluator) for language, evaluator in EVALUATORS.items()),
        SkipParser(),
        _Unknown(),
    ],
    path=str(page.ROOT),
    patterns=["README.md", "docs/*.md", "docs/guides/*.md"],
    setup=page.setup,
    teardown=page.teardown,
)
pytest_collect_file = PAGES.pytest()


def pytest_configure(config: pytest.Config) -> None:
    # Before any library reads them: the hub is a folder, and there is no network.
    hub = tempfile.mkdtemp(prefix="hub-")
    config.add_cleanup(lambda: shutil.rmtree(hub, ignore_errors=True))
    os.environ.update(HF_HOME=hub, HF_HUB_CACHE=f"{hub}/hub", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAY_worker_niceness"] = "0"  # by default Ray's workers wait for everybody else
    # Ray makes a token in the home folder and keeps to it, and every page has a home folder of its own.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["OMP_NUM_THREADS"] = "1"  # servers and pages run side by side, and the networks are tiny
    # Gradio leaves sockets and event loops to the garbage collector. The bundled tokenizer says what it does
    # not know, which is right.
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")
    config.addinivalue_line("filterwarnings", "ignore::dina_lrm.errors.PromptWarning")
    # huggingface_hub hands large files to its HTTP library in a way that this library asks it to change.
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")


def pytest_sessionstart(session: pytest.Session) -> None:
    if _hands_out(session.config):
        return
    import warnings

    with warnings.catch_warnings():  # what libraries say about themselves while they are imported
        warnings.simplefilter("ignore")
        import diffusers  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    start_fork_server()


def _hands_out(config: pytest.Config) -> bool:
    """Whether this process runs no page, but hands them to workers of pytest-xdist."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["stand_ins"] = [astuple(one) for one in page.STAND_INS]
        output["command_seconds"] = COMMAND_SECONDS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})
    page.STAND_INS.extend(page.StandIn(*one) for one in told.get("stand_ins", ()))
    COMMAND_SECONDS.extend(tuple(one) for one in told.get("command_seconds", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[report.location[0]] += report.duration
    terminalreporter.section("pages")
    for name, took in seconds.items():
        terminalreporter.write_line(f"{took:6.1f} s  {name}")
    terminalreporter.section("slowest commands")
    for took, where, command in sorted(COMMAND_SECONDS, reverse=True)[:15]:
        terminalreporter.write_line(f"{took:6.1f} s  {where}: {command}")
    terminalreporter.section("blocks that are not run")
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"{report.location[0]}:{report.location[1]}: {report.longrepr[2]}")
    terminalreporter.section("stand-ins")
    for one in sorted(page.STAND_INS, key=lambda one: (one.page, one.line)):
        terminalreporter.write_line(f"{one.page}:{one.line}: {one.wanted} -> {one.given}")
