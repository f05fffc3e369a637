"""Newer public sets by their columns; the older ones are in `test_sources`."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from dina_lrm.cli import main as cli
from dina_lrm.cli.evaluate_options import Evaluate
from dina_lrm.cli.inspect import Inspect
from dina_lrm.cli.prepare import Prepare
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject
from dina_lrm.data.sources.layouts import SOURCES
from dina_lrm.data.sources.registry import read_source
from tests.unit.data.layouts import dump, encoded, rows_of, shard, table, write_pictures, write_source

CELLS = [{"bytes": encoded(seed), "path": None} for seed in range(3)]
FILE = "data/train-00000-of-00001.parquet"


def read(name: str, root: Path) -> tuple[list[Comparison], list[Reject]]:
    items = list(read_source(name, root, check_images="decode"))
    return [i for i in items if isinstance(i, Comparison)], [i for i in items if isinstance(i, Reject)]


def outcome(comparison: Comparison) -> tuple[Any, ...]:
    pair = comparison.pair
    return (
        pair.chosen == CELLS[0]["bytes"],
        pair.tie,
        (pair.votes_chosen, pair.votes_rejected),
        comparison.chosen_was_first,
        comparison.generators,
    )


def test_rapidata_keeps_its_votes(tmp_path: Path) -> None:
    """The published files: train_0001 and so on, each 1,000 rows."""
    row = {"prompt": "p", "image1": CELLS[0], "image2": CELLS[1], "model1": "flux", "model2": "dalle-3"}
    row |= {"detailed_results": "{}", "image1_path": "flux/155_0.jpg", "image2_path": "dalle-3/155_0.jpg"}
    votes = [(20, 6), (4, 21), (13, 13), (0, 0), (None, 3)]
    rows = [row | {"votes_image1": one, "votes_image2": other} for one, other in votes]
    table(tmp_path / "data/train_0001-00000-of-00001.parquet", rows[:2])
    table(tmp_path / "data/train_0002-00000-of-00001.parquet", rows[2:])
    found, rejects = read("rapidata", tmp_path)
    assert [outcome(c) for c in found] == [
        (True, False, (20, 6), True, ("flux", "dalle-3")),
        (False, False, (21, 4), False, ("dalle-3", "flux")),
        (True, True, (13, 13), True, ("flux", "dalle-3")),
    ]
    assert [c.pair.target for c in found] == [20 / 26, 21 / 25, 0.5]
    assert [reject.reason.split(":")[0] for reject in rejects] == ["votes", "no votes"]


def test_rapidata_with_weighted_votes(tmp_path: Path) -> None:
    row = {"prompt": "p", "image1": CELLS[0], "image2": CELLS[1], "model1": "a", "model2": "b"}
    fields = [f"weighted_results_image{side}_preference" for side in (1, 2)]
    rows = [row | dict(zip(fields, shares, strict=True)) for shares in ((0.75, 0.25), (0.0, 1.0))]
    table(tmp_path / FILE, [*rows, rows[0] | {fields[1]: None}])
    found, rejects = read("rapidata", tmp_path)
    assert [(c.pair.target, c.chosen_was_first) for c in found] == [(0.75, True), (1.0, False)]
    assert [reject.reason for reject in rejects] == [f"no votes: {' and '.join(fields)} are not both there"]


def test_votes_reach_the_prepared_pairs(tmp_path: Path) -> None:
    write_source("rapidata", tmp_path / "set")
    assert shard(read("rapidata", tmp_path / "set")[0], tmp_path / "shard.parquet") == []
    (row,) = rows_of(tmp_path / "shard.parquet")
    assert (row["votes_chosen"], row["votes_rejected"], row["target"]) == (9, 3, 0.75)


def test_open_image_preferences(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": CELLS[0], "rejected": CELLS[1]}
    table(tmp_path / FILE, [row, row | {"rejected": CELLS[0]}, row | {"chosen": None}])
    found, rejects = read("open-image-preferences", tmp_path)
    assert [outcome(c) for c in found] == [(True, False, (None, None), None, (None, None))]
    assert [reject.reason.split(":")[0] for reject in rejects] == ["same picture", "no image"]


def test_editreward_as_its_code_takes_it(tmp_path: Path) -> None:
    write_pictures(tmp_path / "x")
    row = {"prompt": "make it red", "path_src": "x/c.png", "path1": "x/a.png", "path2": "x/b.png"}
    row |= {"model1": "ovis_u1", "model2": "qwen_edit", "choice_dist": None, "confidence": None}
    scores = {"model1_overall_score": 6, "model2_overall_score": 6}
    rows = [
        row | scores | {"tie_case": True},
        row | scores | {"tie_case": False},
        row | scores,
        row | scores | {"model2_overall_score": 3},
        row | {"choice_dist": [2, 7], "confidence": 0.9},
        row | {"tie_case": "perhaps"},
        row | {"path2": "x/missing.png"},
    ]
    dump(tmp_path / "train.json", rows)
    found, rejects = read("editreward", tmp_path)
    assert [c.pair.tie for c in found] == [True, False, True, False, False]
    assert all(c.pair.chosen == tmp_path / "x/a.png" for c in found)
    assert (found[4].pair.votes_chosen, found[4].confidence, found[4].generators) == (
        7,
        0.9,
        ("ovis_u1", "qwen_edit"),
    )
    assert [reject.reason.split(":")[0] for reject in rejects] == ["not true or false", "missing file"]


def test_editreward_as_the_hub_has_it(tmp_path: Path) -> None:
    row = {"instruction": "make it red", "source_img": CELLS[2], "left_output_image": CELLS[0]}
    row |= {"right_output_image": CELLS[1], "left_model": "l", "right_model": "r"}
    votes = ("leftvote", "rightvote", "tie", "nobody")
    table(tmp_path / FILE, [row | {"vote_type": vote} for vote in votes])
    found, rejects = read("editreward", tmp_path)
    assert [outcome(c) for c in found] == [
        (True, False, (None, None), True, ("l", "r")),
        (False, False, (None, None), False, ("r", "l")),
        (True, True, (None, None), True, ("l", "r")),
    ]
    assert found[0].pair.prompt == "make it red"
    assert [reject.reason.split(":")[0] for reject in rejects] == ["votes"]


@pytest.mark.parametrize("name", ["rapidata", "open-image-preferences", "editreward"])
def test_the_commands_read_them(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, num_comparisons = write_source(name, tmp_path)
    assert cli.main(["inspect", name, "--root", str(tmp_path), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["strict_pairs"], counts["rejects"]) == (num_comparisons, {})
    assert counts["pairs_with_votes"] == (1 if name == "rapidata" else 0)


def test_every_source_is_named_where_it_is_taken() -> None:
    guide = (Path(__file__).parents[4] / "docs/guides/data.md").read_text()
    choices = get_args(Evaluate.__annotations__["benchmark"])
    for name in SOURCES:
        assert name in choices
        assert f"| `{name}` |" in guide
        assert all(name in inspect.getsource(command) for command in (Inspect, Prepare))
