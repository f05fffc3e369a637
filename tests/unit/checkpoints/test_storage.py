"""A checkpoint folder that is replaced, and killed at any moment of it."""

import os
from pathlib import Path

import pytest

from dina_lrm.files import atomic_folder, recover_folder

OWNED = ("config.json",)


def run_folder(root: Path) -> Path:
    """A model, and the training state and metrics beside it."""
    target = root / "run"
    (target / "last").mkdir(parents=True)
    (target / "config.json").write_text("old")
    (target / "metrics.jsonl").write_text("metrics")
    return target


def contents(target: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in target.iterdir() if file.is_file()}


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_at_any_rename_loses_nothing(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at the n-th rename, without any clean-up; then another one recovers and saves
    again."""
    target = run_folder(tmp_path)
    renames, rename = iter(range(100)), os.rename

    class Killed(BaseException):
        pass

    def dying(source: object, destination: object) -> None:
        if next(renames) == moment:
            raise Killed
        rename(str(source), str(destination))

    def save(text: str) -> None:
        with atomic_folder(target, OWNED) as aside:
            (aside / "config.json").write_text(text)

    monkeypatch.setattr(os, "rename", dying)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process removes nothing
    try:
        save("new")
    except Killed:
        pass
    monkeypatch.undo()
    recover_folder(target, OWNED)
    assert contents(target)["config.json"] in ("old", "new")
    assert contents(target)["metrics.jsonl"] == "metrics"
    assert (target / "last").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    save("newer")
    assert contents(target) == {"config.json": "newer", "metrics.jsonl": "metrics"}


def test_a_folder_that_belongs_to_its_writer_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "last"
    with atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    with atomic_folder(target) as aside:
        (aside / "b").write_text("new")
    assert contents(target) == {"b": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_whole_folder_cut_between_its_renames_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".last.1234.old"
    old.mkdir()
    (old / "a").write_text("old")
    recover_folder(tmp_path / "last")
    assert contents(tmp_path / "last") == {"a": "old"}
    assert not old.exists()


def test_nothing_to_recover(tmp_path: Path) -> None:
    recover_folder(tmp_path / "none", OWNED)
    target = run_folder(tmp_path)
    (tmp_path / ".other.1234.old").mkdir()
    recover_folder(target, OWNED)
    assert contents(target)["config.json"] == "old"
    assert (tmp_path / ".other.1234.old").is_dir()
