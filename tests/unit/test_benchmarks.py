"""Results of benchmarks say where they come from, whoever writes them."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WRITERS = sorted(BENCHMARKS.glob("*.py"))
READERS = ("results_figure.py", "ship_reward.py")
"""Scripts whose `results` are what they read."""


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "search.py"), "--num-steps", "28"])
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "record.py")))


def test_a_result_says_where_it_comes_from(record: SimpleNamespace, tmp_path: Path) -> None:
    record.write_results(tmp_path, "search", {"rows": [1.5]}, "| a table |", seeds=[3, 4])
    result = json.loads((tmp_path / "search.json").read_text())
    assert result["rows"] == [1.5]
    assert result["about"]["command"].endswith("benchmarks/search.py --num-steps 28")
    assert result["about"]["seeds"] == [3, 4]
    for name in ("commit", "hardware", "date", "python", "libraries"):
        assert result["about"][name]
    page = (tmp_path / "search.md").read_text()
    assert page.startswith("| a table |\n")
    assert result["about"]["commit"] in page
    assert result["about"]["hardware"] in page


def test_a_result_without_seeds_or_with_nan_is_none(record: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        record.write_results(tmp_path, "search", {}, "", seeds=[])
    with pytest.raises(ValueError, match="JSON"):
        record.write_results(tmp_path, "search", {"gold": float("nan")}, "", seeds=[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", WRITERS, ids=lambda file: file.name)
def test_results_are_written_in_one_way(file: Path) -> None:
    """A script with a folder for results writes them by `write_results`, and nothing else into it."""
    text = file.read_text()
    takes_results = "results: Path" in text and file.name not in READERS
    assert not takes_results or "write_results(" in text
    assert "options.results /" not in text.replace('file = options.results / "server_attacks.json"', "")


@pytest.fixture
def replication(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(BENCHMARKS)  # where a script finds its neighbours
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "replication.py")))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ((0.01, 0.02, -0.01, 0.0), "cannot be told here"),
        ((0.01, "+", "+", 0.0), "holds on generators, on damage"),
        (("-", "+", 0.0, 0.0), "holds on generators; fails in distribution"),
        (("+", "+", "+", "+"), "holds everywhere"),
    ],
)
def test_a_verdict_needs_a_difference_that_stands(
    replication: SimpleNamespace, differences: tuple[float | str, ...], expected: str
) -> None:
    rows = [
        {
            "difference": {"value": {"+": 0.03, "-": -0.03}.get(str(one), one)},
            "certain": isinstance(one, str),
        }
        for one in differences
    ]
    assert replication.verdict(rows) == expected
