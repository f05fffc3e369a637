"""Options that several commands have in common."""

import importlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dina_lrm.cli.console import UsageError
from dina_lrm.errors import MissingComponentError
from dina_lrm.models.options import ModelOptions, find_device
from dina_lrm.scaling.rows import is_text

__all__ = [
    "JsonFlag",
    "ModelOptions",
    "NoiseLevels",
    "check_prompt",
    "find_device",
    "need_packages",
    "parse",
    "parse_noise_levels",
    "refuse",
]

OptionsT = TypeVar("OptionsT")


# --- types of options --------------------------------------------------------------------------------------


def parse_noise_levels(text: str) -> tuple[float, ...]:
    """Noise levels as typed.

    >>> parse_noise_levels("0.2,0.5,0.7")
    (0.2, 0.5, 0.7)
    >>> parse_noise_levels("auto")
    ()
    """
    if text == "auto":
        return ()
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"noise levels are numbers separated by commas, such as 0.2,0.5,0.7; got {text!r}"
        ) from None
    for level in levels:
        if not 0 <= level <= 1:  # a NaN fails this too
            raise ValueError(f"a noise level lies in [0, 1] (0 clean, 1 pure noise); got {level:g}")
    return levels


_LEVELS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="SIGMA[,SIGMA...]",
    instance_from_str=lambda parts: parse_noise_levels(parts[0]),
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda levels: [",".join(f"{level:g}" for level in levels) or "auto"],
)
NoiseLevels = Annotated[tuple[float, ...], _LEVELS]
"""`0.4` or `0.2,0.5,0.7`; empty, typed as `auto`, stands for the levels the checkpoint was chosen with."""

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _levels_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Several numbers in settings that know nothing of a command line are noise levels."""
    return _LEVELS if info.type == tuple[float, ...] else None


JsonFlag = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]
"""`--json`: one JSON object a line on stdout."""


# --- what is typed -----------------------------------------------------------------------------------------

_DASHED = "\0"
"""Put before a word behind `--` while tyro reads it: it would take -dash.png for an option."""


def parse(
    kind: type[OptionsT], command: str, arguments: Sequence[str], default: OptionsT | None = None
) -> OptionsT:
    """The options of `dina-lrm COMMAND`; what stands behind `--` is a prompt or a file, also with a dash.

    Args:
        default: what holds where nothing is typed; by default what `kind` says.
    """
    front = list(takewhile(lambda word: word != "--", arguments))
    behind = [_DASHED + word if word.startswith("-") else word for word in arguments[len(front) + 1 :]]
    given: dict[str, Any] = {} if default is None else {"default": default}
    options = tyro.cli(kind, prog=f"dina-lrm {command}", args=[*front, *behind], registry=_REGISTRY, **given)
    typed: Any = options
    marked = {field.name: _unmarked(getattr(typed, field.name)) for field in fields(typed)} if behind else {}
    return replace(typed, **marked)


def _unmarked(value: Any) -> Any:
    match value:
        case str():
            return value.removeprefix(_DASHED)
        case Path():
            return Path(str(value).removeprefix(_DASHED))
        case tuple():
            return tuple(map(_unmarked, value))
    return value


def refuse(arguments: Sequence[str], flags: Iterable[str], reason: str) -> None:
    """UsageError for the first of these flags that was typed, whatever its value: it would be ignored."""
    words = takewhile(lambda word: word != "--", arguments)
    typed = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for flag in flags:
        if flag in typed:
            raise UsageError(f"{flag} {reason}")


def check_prompt(command: str, prompt: str, images: Sequence[str] = ()) -> None:
    """UsageError for a prompt that is none, such as a picture's name where the prompt was forgotten."""
    if not is_text(prompt):
        found = next(index for index, character in enumerate(prompt) if "\ud800" <= character <= "\udfff")
        shown = prompt.encode("utf-8", "backslashreplace").decode()
        raise UsageError(
            f"the prompt is not text: its character {found} is {prompt[found]!a}, half of a surrogate "
            f"pair or a byte that is not UTF-8, in: {shown}"
        )
    if Path(prompt).suffix and "\0" not in prompt and _is_file(prompt):
        files = shlex.join([prompt, *images])
        raise UsageError(
            f'the prompt comes first, and {prompt!r} is a file; as in: dina-lrm {command} "PROMPT" {files}'
        )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a prompt may be longer than a name can be
        return False


# --- servers -----------------------------------------------------------------------------------------------


def need_packages(extra: str, *names: str) -> None:
    """MissingComponentError unless the packages of an extra can be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingComponentError(
                f"{name} is not installed: pip install 'dina-lrm[{extra}]'"
            ) from error
