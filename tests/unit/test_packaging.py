"""What a release must agree on."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import dina_lrm

ROOT = Path(__file__).parents[2]


def test_changelog_names_this_version():
    """The newest heading under Unreleased is the package's version."""
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == dina_lrm.__version__


def test_every_dependency_that_make_installs_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    names = {re.split(r"[<>=!\[~ ]", line)[0].lower().replace("_", "-") for line in wanted}
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names - pins == set()


NAMES = """
import sys
import pytest

import dina_lrm
assert issubclass(dina_lrm.ScoringError, dina_lrm.DinaError)
assert dina_lrm.alignment.__name__ == "dina_lrm.alignment"
assert "torch" not in sys.modules
for name in ("Pruner", "Guide", "successive_halving"):
    assert getattr(dina_lrm.alignment.search, name)
for name in dina_lrm.__all__:
    assert getattr(dina_lrm, name), name
"""


@pytest.mark.long
def test_public_names_are_reached_from_the_package_alone() -> None:
    """In a new process, where nothing has imported the modules behind them; torch is loaded when needed."""
    done = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    """Without the file type checkers ignore every annotation of an installed package."""
    assert (files("dina_lrm") / "py.typed").is_file()
