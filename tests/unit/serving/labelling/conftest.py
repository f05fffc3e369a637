"""Items to label, and votes on them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dina_lrm.serving.labelling.app import Labelling, create_app
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import Vote, VoteStore
from tests.pictures import noise_picture
from tests.rows import write_json_lines
from tests.unit.serving.labelling.page import HERE


def write_picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> str:
    """A picture of noise; its name."""
    noise_picture(seed, *size).save(path)
    return path.name


def make_items(folder: Path, num_pairs: int) -> Path:
    """Rows of two pictures each."""
    names = [write_picture(folder / f"{number}.png", number) for number in range(2 * num_pairs)]
    rows = [
        {"prompt": f"a red circle on a gray background {row}", "images": names[2 * row : 2 * row + 2]}
        for row in range(num_pairs)
    ]
    return write_json_lines(folder / "items.jsonl", rows)


def make_vote(
    number: int, rater: str, pair: int, choice: Any, left_side: Any = "a", seconds: float = 1.0
) -> Vote:
    return Vote(
        id=f"{number:032x}", rater=rater, pair=pair, left_side=left_side, choice=choice, seconds=seconds
    )


@pytest.fixture
def items(tmp_path: Path) -> Items:
    """Six pairs."""
    return read_items(make_items(tmp_path, 6))


@pytest.fixture
def store(tmp_path: Path, items: Items) -> Iterator[VoteStore]:
    store = VoteStore(tmp_path / "votes.sqlite")
    store.bind(items)
    yield store
    store.close()


@pytest.fixture
def reopened(store: VoteStore) -> Iterator[Callable[[], VoteStore]]:
    """The same file through a connection of its own, as another process has it."""
    opened: list[VoteStore] = []

    def reopen() -> VoteStore:
        opened.append(VoteStore(store.path))
        return opened[-1]

    yield reopen
    for one in opened:
        one.close()


@pytest.fixture
def labelling(items: Items, store: VoteStore) -> Labelling:
    return Labelling(items, store, raters_per_pair=2)


@pytest.fixture
def client(labelling: Labelling) -> Iterator[TestClient]:
    with TestClient(create_app(labelling, local_hosts=["127.0.0.1"]), base_url=HERE) as client:
        yield client
