"""The site: a dead link ends the build, and links to files of the repository lead to a page of them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
site_name: test
strict: true
theme: {{name: mkdocs}}
hooks: [{ROOT / "docs" / "hooks.py"}]
validation: {{links: {{not_found: warn, anchors: warn}}}}
"""


def build(folder: Path, page: str) -> subprocess.CompletedProcess[str]:
    (folder / "docs" / "guides").mkdir(parents=True)
    (folder / "mkdocs.yml").write_text(CONFIG)
    (folder / "docs" / "index.md").write_text("# Home\n\n## Known\n")
    (folder / "docs" / "guides" / "page.md").write_text(page)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "link",
    ["missing.md", "../missing.md", "../../src/dina_lrm/core/missing.py", "../index.md#unknown", "#unknown"],
)
def test_a_dead_link_ends_the_build(tmp_path: Path, link: str) -> None:
    built = build(tmp_path, f"# Page\n\nSee [it]({link}).\n")
    assert built.returncode == 1
    assert link in built.stderr


def test_links_to_pages_and_to_files_of_the_repository(tmp_path: Path) -> None:
    built = build(
        tmp_path, "# Page\n\n[a](../index.md#known) [b](../../src/dina_lrm/core/noise.py) [c](#page)\n"
    )
    assert built.returncode == 0, built.stderr
    html = (tmp_path / "site" / "guides" / "page" / "index.html").read_text()
    assert 'href="../../source/src/dina_lrm/core/noise.py/"' in html
    assert "NoiseSchedule" in (tmp_path / "site/source/src/dina_lrm/core/noise.py/index.html").read_text()
