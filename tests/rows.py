"""Rows that tests write."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json_lines(file: Path, rows: Iterable[Any]) -> Path:
    """One row a line; a row that is a string stands as it is, for lines that are no JSON."""
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file
