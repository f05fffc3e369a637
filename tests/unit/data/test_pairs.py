"""Rows become pairs or rejects; nothing vanishes and nothing stops the reading."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from dina_lrm.data.pairs import PreferencePair, Reject, load_image, write_rejects
from dina_lrm.data.sources.own_rows import read_pairs
from dina_lrm.errors import InvalidInputError
from dina_lrm.images import as_picture
from tests.pictures import encoded
from tests.rows import write_json_lines


def png(color: str = "red") -> bytes:
    return encoded(Image.new("RGB", (4, 4), color))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        (tmp_path / f"{name}.png").write_bytes(png(color))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "cut.png").write_bytes(png()[:40])
    return tmp_path


def write_jsonl(folder: Path, rows: list[object]) -> Path:
    return write_json_lines(folder / "rows.jsonl", rows)


GOOD = {"prompt": "a circle", "chosen": "a.png", "rejected": "b.png"}


def test_a_plain_row(folder: Path) -> None:
    rows = read_pairs(write_jsonl(folder, [GOOD | {"source": "test", "width": 64, "height": 48}]))
    assert rows.rejects == []
    (pair,) = rows.pairs
    assert pair.chosen == folder / "a.png"
    assert pair.rejected == folder / "b.png"
    assert (pair.source, pair.width, pair.height, pair.target) == ("test", 64, 48, 1.0)


@pytest.mark.parametrize(("chosen", "rejected", "target"), [(3, 1, 0.75), (1, 3, 0.75), (5, 0, 1.0)])
def test_the_majority_is_chosen_whatever_the_row_calls_it(
    folder: Path, chosen: int, rejected: int, target: float
) -> None:
    rows = read_pairs(write_jsonl(folder, [GOOD | {"votes_chosen": chosen, "votes_rejected": rejected}]))
    (pair,) = rows.pairs
    assert pair.target == target
    assert isinstance(pair.chosen, Path)
    assert pair.chosen.name == ("a.png" if chosen > rejected else "b.png")
    assert (pair.votes_chosen, pair.votes_rejected) == (max(chosen, rejected), min(chosen, rejected))


def test_even_votes_are_a_tie(folder: Path) -> None:
    file = write_jsonl(folder, [GOOD, GOOD | {"votes_chosen": 2, "votes_rejected": 2}])
    rows = read_pairs(file)
    assert len(rows.pairs) == 1
    assert [(reject.row, reject.reason) for reject in rows.rejects] == [(1, "tie: nobody won")]
    kept = read_pairs(file, ties="half")
    assert [(pair.tie, pair.target) for pair in kept.pairs] == [(False, 1.0), (True, 0.5)]


def test_ranks_give_every_strict_pair_and_list_the_ties(folder: Path) -> None:
    row = {"prompt": "p", "images": ["a.png", "b.png", "c.png"], "ranks": [2, 1, 2]}
    rows = read_pairs(write_jsonl(folder, [row]))
    assert [(pair.chosen.name, pair.rejected.name) for pair in rows.pairs] == [
        ("b.png", "a.png"),
        ("b.png", "c.png"),
    ]
    assert [reject.reason for reject in rows.rejects] == ["tie: nobody won"]


BAD_ROWS = {
    "not JSON": "{oops",
    "not a JSON object": [1, 2],
    "no prompt": {"chosen": "a.png", "rejected": "b.png"},
    "no prompt: prompt = ' '": GOOD | {"prompt": " "},
    "no prompt: prompt = 3": GOOD | {"prompt": 3},
    "has neither": {"prompt": "p"},
    "has both": GOOD | {"images": ["a.png", "b.png"], "ranks": [1, 2]},
    "missing file: chosen = gone.png": GOOD | {"chosen": "gone.png"},
    "no image: rejected is missing": {"prompt": "p", "chosen": "a.png"},
    "unreadable image": GOOD | {"rejected": "broken.png"},
    "unreadable image: ": GOOD | {"chosen": "cut.png"},
    "not a number: votes_chosen = nan": '{"prompt": "p", "chosen": "a.png", "rejected": "b.png", '
    '"votes_chosen": NaN, "votes_rejected": 1}',
    "not a number: votes_rejected = None": GOOD | {"votes_chosen": 3},
    "votes: 0 and 0": GOOD | {"votes_chosen": 0, "votes_rejected": 0},
    "votes: -1 and 3": GOOD | {"votes_chosen": -1, "votes_rejected": 3},
    "not a number: ranks[1] = 'x'": {"prompt": "p", "images": ["a.png", "b.png"], "ranks": [1, "x"]},
    "two lists of the same length": {"prompt": "p", "images": ["a.png", "b.png"], "ranks": [1]},
    "needs at least 2": {"prompt": "p", "images": ["a.png"], "ranks": [1]},
    "not a number: width = 'wide'": GOOD | {"width": "wide"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_a_reject_with_its_reason_and_the_rest_goes_on(folder: Path, reason: str) -> None:
    rows = read_pairs(write_jsonl(folder, [GOOD, BAD_ROWS[reason], GOOD]))
    assert len(rows.pairs) == 2
    assert rows.num_rows == 3
    (reject,) = rows.rejects
    assert reject.row == 1
    assert reason in reject.reason
    assert "1 rejected" in rows.summary()


def test_all_rejects_are_listed_in_the_file(folder: Path) -> None:
    rejects_file = folder / "out" / "rejects.jsonl"
    rows = read_pairs(write_jsonl(folder, [*BAD_ROWS.values(), GOOD]), rejects_file=rejects_file)
    listed = [json.loads(line) for line in rejects_file.read_text().splitlines()]
    assert [entry["row"] for entry in listed] == list(range(len(BAD_ROWS)))
    assert all(entry["reason"] for entry in listed)
    assert len(rows.pairs) == 1


def test_parquet_with_bytes_and_with_image_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table(
        {
            "prompt": ["p", "q"],
            "chosen": [{"bytes": png("red"), "path": None}, {"bytes": b"", "path": None}],
            "rejected": [png("blue"), png("blue")],
            "votes_chosen": [2, 2],
            "votes_rejected": [1, None],
        }
    )
    parquet.write_table(table, path)
    rows = read_pairs(path)
    assert load_image(rows.pairs[0].chosen).getpixel((0, 0)) == (255, 0, 0)
    assert rows.pairs[0].target == pytest.approx(2 / 3)
    assert [reject.row for reject in rows.rejects] == [1]


def test_without_checking_only_existence_is_tested(folder: Path) -> None:
    rows = read_pairs(write_jsonl(folder, [GOOD | {"chosen": "broken.png"}]), check_images=False)
    assert len(rows.pairs) == 1


def test_image_root_moves_relative_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = read_pairs(write_jsonl(elsewhere, [GOOD]), image_root=folder)
    assert rows.pairs[0].chosen == folder / "a.png"


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nothing at .*gone\.jsonl"):
        read_pairs(tmp_path / "gone.jsonl")
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(InvalidInputError, match=r"rows are \.jsonl, .*not .*rows\.xlsx"):
        read_pairs(tmp_path / "rows.xlsx")


def test_load_image_errors_name_the_file(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"missing file.*gone\.png"):
        load_image(folder / "gone.png")
    with pytest.raises(InvalidInputError, match=r"unreadable image.*broken\.png"):
        load_image(folder / "broken.png")


def test_write_rejects_leaves_no_partial_file(tmp_path: Path) -> None:
    write_rejects([Reject(row=0, reason="r")], tmp_path / "rejects.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]


def test_target_without_votes_is_one() -> None:
    assert PreferencePair(prompt="p", chosen=b"x", rejected=b"y").target == 1.0


def test_a_picture_is_trained_on_as_it_is_scored(tmp_path: Path) -> None:
    """A turned photograph, a transparent drawing and a deep grey scan: the same pixels on both paths."""
    ramp = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.dstack([ramp, ramp[..., 0]])).save(tmp_path / "transparent.png")
    Image.fromarray(ramp[..., 0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    for name, size in (("turned.png", (16, 24)), ("transparent.png", (24, 16)), ("deep.png", (24, 16))):
        loaded = load_image(tmp_path / name)
        assert loaded.size == size
        expected = (as_picture(tmp_path / name) * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(loaded), expected)
