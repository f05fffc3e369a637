"""Each backbone family in turn."""

from typing import Any

import pytest

from tests.families import FAMILIES, load_pipeline


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipeline(family: str, family_folders: Any) -> Any:
    return load_pipeline(family_folders(family))
