"""A prepared folder."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.prepare.files import hpdv3, run


@pytest.fixture(scope="module")
def prepared(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Root, shards and counts of a run with two processes."""
    root = hpdv3(tmp_path_factory.mktemp("hpdv3"))
    output = root / "latents"
    counts = run(root, output, tiny_pipeline, processes=2)
    return root, output, counts
