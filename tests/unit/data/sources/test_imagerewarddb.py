"""ImageRewardDB as the hub holds it: archives, or the same unpacked."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dina_lrm.cli import main as cli
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject, load_image
from dina_lrm.data.sources import imagerewarddb
from dina_lrm.data.sources.registry import read_source, source_files, source_length
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import write_part

PROMPTS = [("000864-0061", "a holy woman", [2, 1, 2]), ("000001-0001", "a tree", [2, 1])]


def read(root: Path, check: Any = "exists") -> tuple[list[Comparison], list[Reject]]:
    items = list(read_source("imagerewarddb", root, check_images=check))
    assert len(items) == source_length("imagerewarddb", root)
    return [i for i in items if isinstance(i, Comparison)], [i for i in items if isinstance(i, Reject)]


def changed(archive: Path, members: dict[str, bytes | None]) -> None:
    """The archive with other content of some members; None removes one."""
    with zipfile.ZipFile(archive) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as file:
        for name, new in (content | members).items():
            if new is not None:
                file.writestr(name, new)


@pytest.mark.parametrize("unpacked", [False, True])
def test_pictures_of_a_prompt_are_ranked(unpacked: bool, tmp_path: Path) -> None:
    """Its rows stand apart in the list; ranks 2, 1, 2 are two wins of the second picture and a tie."""
    write_part(tmp_path, "test_1", PROMPTS, unpacked=unpacked)
    write_part(tmp_path, "test_2", [("7", "a fish", [1, 2])], unpacked=unpacked)
    write_part(tmp_path, "train_1", PROMPTS, unpacked=unpacked)
    found, rejects = read(tmp_path, check="decode")
    assert rejects == []
    assert [(c.pair.prompt, c.pair.tie, c.chosen_was_first, c.row) for c in found] == [
        ("a holy woman", False, False, 0),
        ("a holy woman", True, True, 0),
        ("a holy woman", False, True, 0),
        ("a tree", False, False, 1),
        ("a fish", False, True, 0),
    ]
    assert load_image(found[0].pair.chosen).size == (32, 32)
    assert found[0].pair.chosen == found[2].pair.chosen


def test_an_archive_equals_its_unpacked_folder(tmp_path: Path) -> None:
    archive = write_part(tmp_path, "test_1", PROMPTS)
    packed, _ = read(tmp_path)
    with zipfile.ZipFile(archive) as file:
        file.extractall(archive.with_suffix(""))
    both, _ = read(tmp_path)
    assert len(source_files("imagerewarddb", tmp_path)) == 1, "a part counts once"
    for one, other in zip(packed, both, strict=True):
        assert isinstance(other.pair.chosen, Path)
        assert (one.pair.prompt, one.row, one.pair.chosen) == (
            other.pair.prompt,
            other.row,
            other.pair.chosen.read_bytes(),
        )


def test_what_cannot_be_read_costs_its_own_pictures(tmp_path: Path) -> None:
    """Some pictures of the published set are empty files."""
    archive = write_part(tmp_path, "test_1", [("0", "p", [1, 2, 3, 4]), ("1", "q", [1])])
    changed(archive, {"test_1-0-0.webp": b"", "test_1-0-1.webp": None})
    found, rejects = read(tmp_path)
    assert len(found) == 1
    assert sorted({reject.reason.split(" images")[0] for reject in rejects}) == [
        "missing file: image_path =",
        "one picture: prompt_id 1 has nothing to compare it with",
        "unreadable image:",
    ]
    assert all(reject.file == "images/test/test_1.zip" for reject in rejects)


def test_rows_that_are_none(tmp_path: Path) -> None:
    archive = write_part(tmp_path, "test_1", [("0", "p", [1, 2, "first", None, 3])])
    found, rejects = read(tmp_path)
    assert len(found) == 3
    assert [(reject.row, reject.reason) for reject in rejects] == [
        (2, "not a number: rank = 'first'"),
        (3, "not a number: rank = None"),
    ]
    rows = [{"image_path": 3}, "no row", {"image_path": "a.webp", "prompt_id": "0", "prompt": " ", "rank": 1}]
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("test_1.json", json.dumps(rows))
    assert [reject.reason.split(":")[0] for reject in read(tmp_path)[1]] == [
        "not text",
        "not a JSON object",
        "no prompt",
    ]


@pytest.mark.parametrize("damage", ["cut", "empty", "no list", "no zip", "list of another form"])
def test_a_damaged_archive_is_one_reject(damage: str, tmp_path: Path) -> None:
    archive = write_part(tmp_path, "test_1", PROMPTS)
    write_part(tmp_path, "test_2", [("7", "a fish", [1, 2])])
    match damage:
        case "cut":
            archive.write_bytes(archive.read_bytes()[:-200])
        case "empty":
            archive.write_bytes(b"")
        case "no zip":
            archive.write_bytes(b"not an archive" * 100)
        case "no list":
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("readme.txt", "")
        case _:
            with zipfile.ZipFile(archive, "w") as file:
                file.writestr("test_1.json", "{}")
    found, rejects = read(tmp_path)
    assert [c.pair.prompt for c in found] == ["a fish"]
    assert [reject.file for reject in rejects] == ["images/test/test_1.zip"]
    assert rejects[0].reason.startswith(("damaged file: ", "not a JSON list"))


def test_a_picture_of_any_size_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(tmp_path, "test_1", [("0", "p", [1, 2])])
    monkeypatch.setattr(imagerewarddb, "MAX_PICTURE_BYTES", 10)
    ((_, (reject,)),) = [read(tmp_path)]
    assert reject.reason.endswith("bytes, at most 10")


def test_the_commands_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = write_part(tmp_path, "test_1", PROMPTS)
    assert cli.main(["inspect", "imagerewarddb", "--root", str(tmp_path), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["strict_pairs"], counts["ties"], counts["images"]) == (3, 1, 5)
    assert (counts["missing_images"], counts["unreadable_images"]) == (0, 0)
    shutil.move(archive, archive.with_name("other.zip"))
    with pytest.raises(InvalidInputError, match=r"no images/test/test_\*\.zip, .* in "):
        list(read_source("imagerewarddb", tmp_path))
