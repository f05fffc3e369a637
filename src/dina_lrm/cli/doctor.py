"""`dina-lrm doctor`: what is installed, where it runs, what is bundled, whether a score can be computed.

With `--pipeline ID` and no other reward than the bundled one: what would be done with that generator.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro

from dina_lrm.cli.console import print_json, stdout
from dina_lrm.cli.options import JsonFlag, ModelOptions, find_device, parse
from dina_lrm.scaling.settings import Viewing

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
)
EXTRAS = {
    "serve": ("fastapi", "uvicorn", "gradio", "prometheus-client"),
    "scale": ("ray",),
    "track": ("tensorboard", "wandb"),
}
PROMPT = "a red circle on a gray background"


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check the installation; exits with 1 when something that scoring needs does not work.

    --pipeline ID without --model says what would be done with that generator instead: recipe, blocks, taps,
    parameters, memory, FLOPs. Only its configs are read. With --model, that reward is loaded over it.
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)
    as_json: JsonFlag = False
    """Print one JSON object instead of a list."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; `ok` is None where there is nothing to pass or fail."""

    name: str
    detail: str
    ok: bool | None = None


def main(arguments: Sequence[str]) -> int:
    options = parse(Doctor, "doctor", arguments)
    findings: list[Finding] = []
    console = stdout()

    def tell(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            if not options.as_json:
                mark = {True: "[green]ok[/]  ", False: "[red]FAIL[/]", None: "    "}[finding.ok]
                console.print(mark, f"[bold]{finding.name:<18}[/]", end=" ")
                console.print(finding.detail, markup=False, soft_wrap=True)

    tell(examine_installation(options.model.device))
    generator, plan = options.model.pipeline, None
    if generator is not None and options.model.model == "bundled":
        plan, found = examine_pipeline(generator)
        tell(found)
    else:
        tell(examine_reward(options.model))
    healthy = all(finding.ok is not False for finding in findings)
    if options.as_json:
        report = {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}
        print_json(report if plan is None else report | {"plan": plan})
    elif not healthy:
        console.print("\nSomething that is needed does not work; see FAIL above.")
    return 0 if healthy else 1


def examine_installation(device: str) -> Iterator[Finding]:
    """The findings, one by one, cheap ones first."""
    from dina_lrm import __version__

    yield Finding(
        name="dina-lrm", detail=f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    yield Finding(name="packages", detail=", ".join(f"{name} {installed(name)}" for name in PACKAGES))
    for extra, names in EXTRAS.items():
        found = [f"{name} {installed(name)}" for name in names if installed(name) != "missing"]
        missing = [name for name in names if installed(name) == "missing"]
        parts = [*found, *(["not installed: " + ", ".join(missing)] if missing else [])]
        yield Finding(name=f"extra {extra!r}", detail="; ".join(parts))
    yield attempt("device", lambda: describe_device(device))
    yield Finding(name="memory", detail=describe_memory())


def examine_reward(options: ModelOptions) -> Iterator[Finding]:
    """Load a reward and score with it."""
    if options.model == "bundled":
        yield attempt("bundled pipeline", lambda: describe_folder("pipeline"))
        yield attempt("bundled reward", lambda: describe_folder("reward"))
    try:
        started = time.perf_counter()
        model = options.load()
    except Exception as error:
        yield Finding(name="model", detail=f"{type(error).__name__}: {error}", ok=False)
        return
    yield Finding(name="model", detail=describe_model(model, time.perf_counter() - started), ok=True)
    yield attempt("score", lambda: check_score(model))
    yield Finding(name="memory after", detail=describe_memory())


def examine_pipeline(pipeline: str) -> tuple[dict[str, object] | None, list[Finding]]:
    """The plan for a generator, and the same for people; None and one line where there can be none."""
    from dina_lrm.cli.plan import make_plan

    try:
        plan = make_plan(pipeline)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # the hub's errors take several lines
        return None, [Finding(name="pipeline", detail=f"{pipeline}: {reason}", ok=False)]
    lines = [Finding(name=name, detail=detail, ok=ok) for name, detail, ok in plan.lines()]
    return plan.to_dict(), [Finding(name="pipeline", detail=pipeline), *lines]


def attempt(name: str, check: Callable[[], str]) -> Finding:
    """Run a check; whatever it raises is a failed finding, since a doctor that dies helps nobody."""
    try:
        return Finding(name=name, detail=check(), ok=True)
    except Exception as error:
        return Finding(name=name, detail=f"{type(error).__name__}: {error}", ok=False)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def describe_device(name: str) -> str:
    import torch

    device = find_device(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device}: {cores} cores, {torch.get_num_threads()} threads, {platform.machine()}"


def describe_memory() -> str:
    """Resident set of this process and what the machine has left."""
    import psutil

    memory, process = psutil.virtual_memory(), psutil.Process().memory_info()
    return (
        f"{process.rss / 2**30:.2f} GiB in use here, "
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    )


def describe_folder(part: str) -> str:
    """Size and parts of a bundled folder."""
    folder = Path(str(files("dina_lrm.shapes") / "weights" / part))
    if not folder.is_dir():
        raise FileNotFoundError(f"the package holds no folder shapes/weights/{part}")
    contents = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in contents)
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return f"{size / 1e6:.1f} MB in {len(contents)} files: {' '.join(names)}"


def describe_model(model: Any, seconds: float) -> str:
    config = model.config
    counts = model.num_parameters()
    taps = f"image taps {list(config.image_taps)}, text taps {list(config.text_taps)}"
    levels = ", ".join(f"{level:g}" for level in config.noise_levels)
    sizes = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items() if count)
    return (
        f"{config.backbone}, {config.num_blocks} blocks, {taps}, {config.tuning}; scored at {levels}; "
        f"{'calibrated' if config.calibrations else 'not calibrated'}; {sizes}; loaded in {seconds:.1f} s"
    )


def check_score(model: Any) -> str:
    """Score a drawn picture twice: the two must agree, and be a number."""
    import math

    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), (128, 128, 128))
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(220, 40, 40))
    levels = Viewing().levels(model.config.noise_levels)
    seconds: list[float] = []
    scores: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        scores.append(float(model.score([PROMPT], [image], noise_levels=levels, seed=0).scores[0]))
        seconds.append(time.perf_counter() - started)
    if not math.isfinite(scores[0]) or scores[0] != scores[1]:
        raise RuntimeError(f"two scores of one picture with one seed are {scores[0]} and {scores[1]}")
    return f"{scores[0]:+.3f} for {PROMPT!r}, the same twice; {1000 * seconds[-1]:.0f} ms"
