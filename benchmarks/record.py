"""What every result of a benchmark carries: the command, the commit, the machine, the day, the seeds.

    from record import write_results          # benchmarks/ is on the path of a script that lies in it
    write_results(options.results, "search", rows, table, seeds=options.seeds)

writes search.json ({"about": ..., **rows}) and search.md, whose last line says the same. There is no other
way to write a result, so none is without.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dina_lrm.files import atomic_write

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def about(seeds: Sequence[int]) -> dict[str, Any]:
    """Where a result comes from.

    Raises:
        ValueError: no seeds.
    """
    if not seeds:
        raise ValueError("a result names the seeds that it is made from")
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": list(seeds),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def write_results(
    folder: Path, name: str, content: Mapping[str, Any], text: str | None = None, *, seeds: Sequence[int]
) -> None:
    """FOLDER/NAME.json and, where there is a text, FOLDER/NAME.md.

    Args:
        content: what was measured, of JSON types; NaN is refused, since JSON has none.
        text: the same as a table, in Markdown.
    """
    origin = about(seeds)
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps({"about": origin, **content}, indent=1, allow_nan=False) + "\n"
    atomic_write(folder / f"{name}.json", record.encode())
    if text is None:
        return
    said = f"`{origin['command']}`, commit {origin['commit']}, {origin['date']}. {origin['hardware']}."
    atomic_write(folder / f"{name}.md", f"{text.rstrip()}\n\n{said}\n".encode())


def shown(value: Mapping[str, float], form: str) -> str:
    """A share and its interval, {"value", "low", "high"}, in %."""
    mean, low, high = (form.format(100 * value[name]) for name in ("value", "low", "high"))
    return f"{mean} ({low} to {high})"


def commit() -> str:
    """Of the checkout that the script lies in, with a note where tracked files differ from it; results of
    benchmarks do not count."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Processor, cores that may be used, and the GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cores} cores of {processor()} ({torch.backends.cpu.get_cpu_capability()}), {gpu}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
