"""Public sets from the hub, offline: a local folder, or the two functions that would reach it."""

from pathlib import Path
from typing import Any

import pytest

from dina_lrm.cli import main as cli
from dina_lrm.data.comparisons import Comparison
from dina_lrm.data.pairs import Reject
from dina_lrm.data.sources.hub import read_hub
from dina_lrm.data.sources.layouts import SOURCES
from dina_lrm.data.sources.registry import read_source
from dina_lrm.errors import InvalidInputError
from tests.unit.data.layouts import encoded, table, write_part, write_source

STREAMED = [name for name, source in SOURCES.items() if source.hub and source.hub.by != "archives"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_hubs_stream_equals_the_files(tmp_path: Path) -> None:
    """Offline: `datasets` streams a local folder of the same layout."""
    cell = {"bytes": encoded(1), "path": "left.png"}
    row = {"prompt": "p", "left_image": cell, "right_image": {"bytes": encoded(2), "path": "right.png"}}
    row |= {"left_model": "l", "right_model": "r"}
    rows = [row | {"vote_type": vote} for vote in ("rightvote", "tievote", "nobody")]
    table(tmp_path / "data" / "test_v1-00000-of-00001.parquet", rows)
    streamed = list(read_hub("genai-bench", dataset=str(tmp_path / "data"), check_images="decode"))
    local = list(read_source("genai-bench", tmp_path / "data", check_images="decode"))
    assert [item.pair for item in streamed if isinstance(item, Comparison)] == [
        item.pair for item in local if isinstance(item, Comparison)
    ]
    assert [item.reason for item in streamed if isinstance(item, Reject)] == [
        item.reason for item in local if isinstance(item, Reject)
    ]
    assert len(streamed) == len(local) == 3
    with pytest.raises(InvalidInputError, match="hpdv3 is not published as a table"):
        list(read_hub("hpdv3"))


def test_imagerewarddb_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loading script: `datasets` 4 and later refuse it."""
    import huggingface_hub

    asked: list[tuple[Any, ...]] = []

    def snapshot_download(repository: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append((repository, repo_type, allow_patterns[0]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write_part(tmp_path, "test_1", [("0", "p", [1, 2, 2])])
    streamed = list(read_hub("imagerewarddb"))
    assert streamed == list(read_source("imagerewarddb", tmp_path))
    assert len(streamed) == 3
    assert asked == [("zai-org/ImageRewardDB", "dataset", "images/test/test_*.zip")]
    assert list(read_hub("imagerewarddb", dataset=str(tmp_path))) == streamed, "a local copy"
    assert len(asked) == 1


def test_rapidata_is_found_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its splits on the hub are train_0001, train_0002, ..., which are one here."""
    import datasets

    write_source("rapidata", tmp_path / "set")
    load, asked = datasets.load_dataset, []

    def load_dataset(path: str, *, data_files: dict[str, list[str]], **options: Any) -> Any:
        asked.append((path, data_files))
        return load(path, data_files={"train": str(tmp_path / "set/data/*.parquet")}, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = read_hub("rapidata")
    assert isinstance(found, Comparison)
    assert (found.pair.votes_chosen, found.pair.votes_rejected) == (9, 3)
    repository = "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3"
    assert asked == [("parquet", {"train": [f"hf://datasets/{repository}/**/train*.parquet"]})]


@pytest.mark.parametrize("name", [*STREAMED, "imagerewarddb"])
def test_a_folder_without_its_files_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(InvalidInputError, match=f"is this the folder of {name}"):
        list(read_hub(name, dataset=str(tmp_path)))


@pytest.mark.parametrize("name", [*STREAMED, "imagerewarddb"])
def test_a_hub_that_cannot_be_reached(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert cli.main(["inspect", name]) == 1
    error = capsys.readouterr().err
    assert f"{name}: " in error
    assert "cannot be read from the hub: no route to host" in error.replace("\n", " ")
    assert "Traceback" not in error


def test_a_split_that_the_hub_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, split: str, **__: Any) -> None:
        raise ValueError(f"Bad split: {split}. Available splits: ['train']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidInputError, match=r"editreward: .* Bad split: test. Available splits"):
        list(read_hub("editreward", split="test"))
