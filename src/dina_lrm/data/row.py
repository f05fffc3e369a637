"""A row of a file, or why it is none."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BadRow", "FileRow", "Twice", "Values", "checked_row", "shown"]

Values = Mapping[str, Any]


class BadRow(Exception):
    """Says why a row, or a picture of it, cannot be used; becomes a reject."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row and its place."""

    index: int
    """From 0, over the rows of the file, bad ones included."""
    line: int | None
    """Where it begins, from 1, as an editor counts; None where a form has no lines."""
    values: Values | BadRow


def checked_row(values: Any) -> Values | BadRow:
    """The row, or what is wrong with it: no object, a key twice, text that cannot be written as UTF-8.

    >>> checked_row({"prompt": "a cat \\ud83d"})
    BadRow('text: prompt has half of a character (a cut-off emoji?) at position 6')
    """
    if not isinstance(values, Mapping):
        return BadRow(f"not a JSON object: {type(values).__name__}")
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    return BadRow(f"text: {field} has {_half(value[error.start])} at position {error.start}")
            if "\0" in value:
                return BadRow(f"text: {field} has a NUL character at position {value.index(chr(0))}")
        elif isinstance(value, Twice):
            return BadRow(f"not JSON: the key {shown(value.key)} stands twice")
        elif isinstance(value, Mapping):
            inside = [
                (f"{field}.{key}" if field else str(key), one)
                for key, one in value.items()
                if not _plain(one)
            ]
            waiting += [("a name of a field", key) for key in value if not _plain(key)] + inside[::-1]
        elif isinstance(value, list):
            waiting += [(f"{field}[{i}]", one) for i, one in enumerate(value) if not _plain(one)][::-1]
    return values


def _plain(value: Any) -> bool:
    """What most cells hold, and nothing can be wrong with."""
    return value.isascii() and "\0" not in value if type(value) is str else type(value) in _PLAIN


_PLAIN = {int, float, bool, type(None), bytes}


def _half(character: str) -> str:
    """Bytes that are no UTF-8 are decoded as halves of characters, see `_UTF_8`."""
    if "\udc80" <= character <= "\udcff":
        return f"a byte that is not UTF-8 (0x{ord(character) - 0xDC00:02x}; save the file as UTF-8)"
    return "half of a character (a cut-off emoji?)"


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it holds.

    >>> shown("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 62
    short.maxlist = short.maxtuple = short.maxdict = 4
    return short.repr(value)


class Twice(dict[str, Any]):
    """An object of JSON in which a key stands twice, so that nobody knows which value was meant."""

    key: str
