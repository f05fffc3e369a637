"""The folder of each backbone family in turn."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(family: str, family_folders: Any) -> Path:
    return family_folders(family)
