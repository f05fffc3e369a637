"""Pairs set aside: no prompt and no picture in both parts."""

import json
from pathlib import Path

import numpy as np
import pytest

from dina_lrm.build.pairs import source_parts
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.sources.registry import read_source
from dina_lrm.data.split import fold_prompt, held_out
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import dump, encoded, table


def test_no_prompt_and_no_picture_is_in_both_parts() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 400, 1000)
    # A picture belongs to a prompt, but every tenth pair borrows one of another prompt.
    chosen = 3 * prompts + rng.integers(0, 3, 1000)
    rejected = np.where(rng.random(1000) < 0.1, rng.integers(0, 1200, 1000), 3 * prompts + 2)
    aside = held_out(prompts, chosen, rejected, fraction=0.1, seed=1)
    assert 90 <= aside.sum() <= 100
    assert not set(prompts[aside]) & set(prompts[~aside])
    pictures = [set(np.concatenate([chosen[part], rejected[part]])) for part in (aside, ~aside)]
    assert not pictures[0] & pictures[1]


def test_the_split_follows_from_the_seed_and_the_limit_holds() -> None:
    prompts, chosen = np.arange(500), 2 * np.arange(500)
    one, again, other = (held_out(prompts, chosen, chosen + 1, fraction=0.2, seed=s) for s in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert held_out(prompts, chosen, chosen + 1, fraction=0.2, max_pairs=7).sum() == 7


def test_a_large_group_is_passed_over() -> None:
    prompts = [0] * 90 + list(range(1, 11))
    pictures = np.arange(100)
    aside = held_out(prompts, pictures, pictures + 100, fraction=0.1)
    assert not aside[:90].any()
    assert aside.sum() == 10


@pytest.mark.parametrize("prompts", [[0], [0, 0], [0, 0, 0]])
def test_one_group_cannot_be_split(prompts: list[int]) -> None:
    pictures = np.arange(len(prompts))
    with pytest.raises(InvalidInputError, match="1 group"):
        held_out(prompts, pictures, pictures + 9, fraction=0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan"), -1.0])
def test_the_fraction_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        held_out([0, 1], [0, 1], [2, 3], fraction=fraction)


def test_prompts_that_differ_in_case_and_punctuation_are_one() -> None:
    assert fold_prompt("A Cat!") == fold_prompt(" a cat")


# --- a source


def some_rows(root: Path, num: int = 60) -> Path:
    """Rows that share prompts up to case, pictures by name and by content; ties and missing ones too."""
    (root / "x").mkdir()
    for index in range(2 * num):
        (root / f"{index}.png").write_bytes(encoded(index, (16, 16)))
    (root / "copy.png").write_bytes((root / "0.png").read_bytes())
    rows = [
        {"prompt": f"Prompt {index}", "chosen": f"{2 * index}.png", "rejected": f"x/../{2 * index + 1}.png"}
        for index in range(num)
    ]
    rows[1]["prompt"] = "prompt, 0!"
    rows[2]["chosen"] = "3.png"
    rows[3]["rejected"] = "copy.png"
    rows[4] |= {"votes_chosen": 1, "votes_rejected": 1}
    rows[5]["chosen"] = "gone.png"
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    return file


@pytest.mark.parametrize("seed", range(6))
def test_no_prompt_and_no_picture_is_in_both_parts_of_a_source(tmp_path: Path, seed: int) -> None:
    file = some_rows(tmp_path)
    parts = source_parts("jsonl", file, fraction=0.2, seed=seed)
    items = list(read_source("jsonl", file, check_images="none"))
    found = {name: list(part.of(items)) for name, part in parts.items()}
    assert [len(found[name]) for name in ("train", "test")] == [61 - 12, 12]
    assert len(parts["train"]) + len(parts["test"]) == len(items)
    assert all(isinstance(item, Comparison) and not item.pair.tie for item in found["test"])
    folds: list[set[str]] = []
    contents: list[set[bytes]] = []
    for name in ("train", "test"):
        pairs = [item.pair for item in found[name] if isinstance(item, Comparison)]
        folds.append({fold_prompt(pair.prompt) for pair in pairs})
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        contents.append({side.read_bytes() for side in sides if isinstance(side, Path) and side.exists()})
    assert not folds[0] & folds[1]
    assert not contents[0] & contents[1]
    again = source_parts("jsonl", file, fraction=0.2, seed=seed)
    assert again["test"].settings() == parts["test"].settings()
    other = source_parts("jsonl", file, fraction=0.2, seed=seed + 1)
    assert other["test"].settings() != parts["test"].settings()


def test_a_source_that_cannot_be_split(tmp_path: Path) -> None:
    file = some_rows(tmp_path)
    with pytest.raises(InvalidInputError, match="must be between 0 and 1"):
        source_parts("jsonl", file, fraction=1.5)
    file.write_text("no row\n")
    with pytest.raises(InvalidInputError, match=r"no pair to split.* 1 comparisons"):
        source_parts("jsonl", file, fraction=0.2)


@pytest.mark.parametrize("name", ["folder", "pickapic", "imagereward"])
def test_every_local_source_can_be_split(tmp_path: Path, name: str) -> None:
    """Ten rows each; of a ranked list all comparisons are in one part."""
    each = 3 if name == "imagereward" else 1
    rows = []
    for index in range(10):
        pictures = [encoded(3 * index + offset, (16, 16)) for offset in range(3)]
        for side, content in zip(("chosen", "rejected", "third"), pictures, strict=True):
            (tmp_path / f"{index}.{side}.png").write_bytes(content)
        if name == "folder":
            (tmp_path / f"{index}.txt").write_text(f"prompt {index}")
        elif name == "pickapic":
            row = {"caption": f"prompt {index}", "jpg_0": pictures[0], "jpg_1": pictures[1]}
            rows.append(row | {"label_0": 1, "label_1": 0})
        else:
            files = [f"{index}.{side}.png" for side in ("chosen", "rejected", "third")]
            rows.append({"prompt": f"prompt {index}", "generations": files, "ranking": [1, 2, 3]})
    if name == "pickapic":
        table(tmp_path / "test_unique-0.parquet", rows)
    elif rows:
        dump(tmp_path / "test.json", rows)
    parts = source_parts(name, tmp_path, fraction=0.3)
    assert {part: len(one) for part, one in parts.items()} == {"train": 7 * each, "test": 3 * each}
