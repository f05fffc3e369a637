"""Shell blocks: `dina-lrm` in this process, servers in the background, everything else by bash."""

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sybil import Example

from tests.docs.background import Background, free_port
from tests.docs.page import ROOT, Page, current, declare, environment

BASH_SECONDS = 120
DEFAULT_PORTS = {"serve": 8000, "label": 8080}
HEALTH = {"serve": "/healthz", "label": "/"}
COMMAND_SECONDS: list[tuple[float, str, str]] = []
"""How long each command took, where it stands, and the command."""
_ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
_PROGRAMS = (["dina-lrm"], ["python", "-m", "dina_lrm"])


def run_shell(example: Example) -> str | None:
    """Run a block's commands in turn; what went wrong, or None."""
    page = current()
    page.output = ""
    for offset, command in commands(str(example.parsed)):
        where = (example.path, example.line + example.parsed.line_offset + 1 + offset)
        started = time.perf_counter()
        try:
            problem = run_command(page, page.here(command), where)
        except AssertionError as error:
            problem = str(error)
        COMMAND_SECONDS.append((time.perf_counter() - started, f"{Path(where[0]).name}:{where[1]}", command))
        if problem is not None:
            return f"{Path(where[0]).name}:{where[1]}: {command}\n{problem}"
    return None


def run_console(example: Example) -> str | None:
    """`$ command` and what it prints: every line that is shown has to be there, ... stands for any text."""
    page = current()
    first = example.line + example.parsed.line_offset + 1
    for number, shown in _console(str(example.parsed)):
        arguments = shlex.split(shown[0], comments=True)[1:]
        code, out, err = _in_process(page, arguments, {})
        printed = " ".join(f"{out}\n{err}".split())
        for line in shown[1:]:
            pattern = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
            if not re.search(pattern, printed):
                where = f"{Path(example.path).name}:{first + number}"
                return f"{where}: {shown[0]}\nended with {code} and did not print {line!r}:\n{out}{err}"
        if any(line.startswith("error:") for line in shown[1:]) != (code != 0):
            return f"{Path(example.path).name}:{first + number}: {shown[0]}\nended with {code}:\n{out}{err}"
    return None


def _console(block: str) -> Iterator[tuple[int, list[str]]]:
    """Each command with the lines that it prints."""
    shown: list[str] = []
    first = 0
    for number, line in enumerate(block.splitlines()):
        if line.startswith("$ "):
            if shown:
                yield first, shown
            first, shown = number, [line.removeprefix("$ ")]
        elif line.strip():
            shown.append(line.strip())
    yield first, shown


def commands(block: str) -> Iterator[tuple[int, str]]:
    """Each command with its line, continuation lines joined."""
    waiting, first = "", 0
    for number, line in enumerate(block.splitlines()):
        first = first if waiting else number
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quote is open
            waiting += "\n"
            continue
        if words:
            yield first, waiting
        waiting = ""
    assert not waiting, f"the block ends within a command: {waiting!r}"


def run_command(page: Page, command: str, where: tuple[str, int]) -> str | None:
    words = shlex.split(os.path.expandvars(command), comments=True)
    assigned = list(itertools.takewhile(_ASSIGNMENT.fullmatch, words))
    given = dict(word.split("=", 1) for word in assigned)
    words = words[len(assigned) :]
    if words[0] == "export":
        return export(page, command)
    if words[:2] == ["accelerate", "launch"]:
        words = launched(words[2:])
        declare("several processes of accelerate", "one, its options checked by accelerate", where=where)
    for program in _PROGRAMS:
        if words[: len(program)] == program:
            return dina_lrm(page, words[len(program) :], given, where)
    if words[0] == "pip":
        return pip(words[1:])
    if words[0] == "make":
        return make(words[1:])
    return bash(page, command)


def dina_lrm(page: Page, arguments: list[str], given: dict[str, str], where: tuple[str, int]) -> str | None:
    if arguments[0] in DEFAULT_PORTS and arguments[1:2] != ["export"] and "--help" not in arguments:
        serve(page, arguments, given, where)
        return None
    code, out, err = _in_process(page, arguments, given)
    page.output += out
    return None if code == 0 else f"ended with {code}:\n{out}{err}"


def _in_process(page: Page, arguments: list[str], given: dict[str, str]) -> tuple[int, str, str]:
    from dina_lrm.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with page.patch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name, value in given.items():
            patch.setenv(name, value)
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def serve(page: Page, arguments: list[str], given: dict[str, str], where: tuple[str, int]) -> None:
    """Start a server on a free port, and wait until it answers."""
    kind, port = arguments[0], DEFAULT_PORTS[arguments[0]]
    if "--port" in arguments:
        position = arguments.index("--port")
        port = int(arguments[position + 1])
        del arguments[position : position + 2]
    here = free_port()
    address = f"127.0.0.1:{port}"
    declare(f"port {port}", "a free port", where=where)
    server = Background([*arguments, "--port", str(here)], page.folder, environment(given))
    page.serve(address, server)
    page.addresses[address] = f"127.0.0.1:{here}"
    server.wait_for(f"http://127.0.0.1:{here}{HEALTH[kind]}")


def export(page: Page, command: str) -> str | None:
    """`export NAME=VALUE`, as bash evaluates it, for the rest of the page."""
    name = shlex.split(command)[1].partition("=")[0]
    ran = _bash(page, f'{command}\nprintf %s "${name}"')
    if ran.returncode == 0:
        page.patch.setenv(name, ran.stdout)
    return None if ran.returncode == 0 else f"ended with {ran.returncode}:\n{ran.stderr}"


def bash(page: Page, command: str) -> str | None:
    ran = _bash(page, command)
    page.output += ran.stdout
    return None if ran.returncode == 0 else f"ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"


def _bash(page: Page, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=page.folder,
        env=environment({"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}),
        capture_output=True,
        text=True,
        timeout=BASH_SECONDS,
    )


# --- commands that would change the machine: looked at, not run


def pip(words: Sequence[str]) -> str | None:
    """The extras that are installed have to exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install", f"pip {words[0]}"
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        if name not in (project["name"], "."):
            return f"installs {name}, which is not {project['name']}"
        for extra in filter(None, extras.split(",")):
            if extra not in project["optional-dependencies"]:
                return f"there is no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}"
    return None


def make(words: Sequence[str]) -> str | None:
    """The targets have to exist."""
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    missing = [word for word in words if word not in targets]
    return f"no target {missing[0]!r}; there are {', '.join(targets)}" if missing else None


def launched(words: list[str]) -> list[str]:
    """The command that `accelerate launch` would start, after accelerate has read its own options."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(words)
    if options.config_file is not None:
        load_config_from_file(options.config_file)
    assert options.module, "accelerate launch needs -m for a module"
    return ["python", "-m", options.training_script, *options.training_script_args]
