"""`dina-lrm demo pictures`: a set like somebody's own, whose counts are true."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dina_lrm.cli import main as cli
from dina_lrm.cli.demo_pictures import Drawn, PictureSet, all_prompts, another, make_pictures, vote
from dina_lrm.cli.demo_scenes import FAULTS, landscape
from dina_lrm.data.pairs import load_image
from dina_lrm.errors import InvalidInputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PictureSet]:
    folder = tmp_path_factory.mktemp("demo") / "mine"
    return folder, make_pictures(folder, num_prompts=30)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "votes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_printed_is_what_lies_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "pictures", "--output", str(tmp_path / "mine"), "--prompts", "12", "--json"]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = rows_of(tmp_path / "mine")
    files = {path.name for path in (tmp_path / "mine" / "pictures").iterdir()} - {"cut-off.jpg"}
    assert printed["pictures"] == len(files) == sum(printed["formats"].values())
    assert printed["rows"] == len(rows)
    assert printed["votes"] == sum(int(row["votes_chosen"]) + int(row["votes_rejected"]) for row in rows)
    assert len({row["prompt"] for row in rows} - {""}) == printed["prompts"] == 12
    assert cli.main(arguments) == 2
    assert "votes.csv is there already" in capsys.readouterr().err


def test_bad_rows_are_where_they_are_said_to_be(made: tuple[Path, PictureSet]) -> None:
    folder, told = made
    lines = (folder / "votes.csv").read_text().splitlines()
    places = [int(bad.split("line ")[1].split(":")[0]) - 1 for bad in told.bad_rows]
    missing, cut, even, empty = (next(csv.reader([lines[place]])) for place in places)
    assert missing[2] == "pictures/not-there.png"
    assert not (folder / missing[2]).exists()
    assert cut[2] == "pictures/cut-off.jpg"
    with pytest.raises(InvalidInputError):
        load_image(folder / cut[2])
    assert even[3] == even[4] == "3"
    assert empty[0] == ""
    others = [row for index, row in enumerate(csv.reader(lines)) if index and index not in places]
    assert all(row[0] and int(row[3]) > int(row[4]) for row in others)


def test_every_picture_can_be_read_in_many_sizes_and_forms(made: tuple[Path, PictureSet]) -> None:
    folder, _ = made
    files = {name for row in rows_of(folder) for name in (row["chosen"], row["rejected"])}
    usable = [folder / file for file in files if "cut" not in file and "not-there" not in file]
    sizes = {load_image(file).size for file in usable}
    assert len(sizes) >= 20
    assert {file.suffix for file in usable} == {".jpg", ".png", ".webp", ".bmp", ".tiff"}
    modes = set()
    for file in usable:
        with Image.open(file) as stored:
            modes.add(stored.mode)
    assert {"RGB", "RGBA", "L"} <= modes
    assert modes & {"I;16", "I"}, "16 bits: which of the two depends on the version of Pillow"
    turned = next(file for file in usable if "rotated" in file.name)
    with Image.open(turned) as stored:
        assert load_image(turned).size == stored.size[::-1]


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_pictures(tmp_path / name, num_prompts=4, seed=seed)
    content = {
        name: {file.name: file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))}
        for name in "abc"
    }
    assert content["a"] == content["b"]
    assert content["a"]["votes.csv"] != content["c"]["votes.csv"]


def test_raters_mind_what_is_wrong() -> None:
    rng = np.random.default_rng(0)
    clean, spoilt = Drawn("clean", 0.0), Drawn("spoilt", -1.5)
    votes = [vote(spoilt, clean, rng) for _ in range(200)]
    assert np.mean([winner == "clean" for winner, *_ in votes]) > 0.9
    assert all(chosen > rejected and chosen + rejected == 7 for _, _, chosen, rejected in votes)
    alike = [vote(clean, Drawn("other", 0.0), rng)[0] for _ in range(400)]
    assert 0.4 < np.mean([winner == "clean" for winner in alike]) < 0.6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_grows_with_its_strength(fault: str) -> None:
    picture = landscape("a lake between mountains", "noon", np.random.default_rng(0), 120, 80)
    spoil = FAULTS[fault][1]
    weak, strong = (spoil(picture, strength, np.random.default_rng(1)) for strength in (0.0, 1.0))
    assert weak.shape == strong.shape == picture.shape
    assert 0 <= strong.min() <= strong.max() <= 1
    assert 0 < np.abs(weak - picture).mean() < np.abs(strong - picture).mean()


def test_another_prompt_differs_in_one_word() -> None:
    rng = np.random.default_rng(0)
    for prompt in all_prompts():
        pairs = zip(prompt.split(), another(prompt, rng).split(), strict=True)
        assert sum(said != other for said, other in pairs) == 1
