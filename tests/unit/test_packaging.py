"""What a release must agree on."""

import re
from pathlib import Path

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
