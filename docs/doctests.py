"""Docstrings as the site shows them: an example at the prompt is code, not nested quotations."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^|(?<=\n\n))(?P<indent>[ ]*)>>> .*?(?=\n\s*\n|\Z)", flags=re.DOTALL)


class Doctests(griffe.Extension):
    """Puts a fence around every paragraph of a docstring that begins with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    return f"{match['indent']}```pycon\n{match[0]}\n{match['indent']}```"
