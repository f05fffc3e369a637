"""A vote is kept once, survives the process, can be taken back, and belongs to its items."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteConflict, VoteStore, rater_name
from tests.unit.serving.labelling.conftest import make_items, make_vote

Reopen = Callable[[], VoteStore]


def test_a_vote_is_there_for_others_at_once(store: VoteStore, reopened: Reopen) -> None:
    vote = make_vote(1, "ada", 3, "left", "b", 2.125)
    assert store.record(vote)
    assert reopened().votes() == [vote]
    assert vote.preferred == "b"


@pytest.mark.parametrize(
    ("left_side", "choice", "preferred"),
    [("a", "left", "a"), ("a", "right", "b"), ("b", "left", "b"), ("b", "right", "a"), ("b", "tie", "tie")],
)
def test_what_is_preferred_does_not_depend_on_the_side(left_side: str, choice: str, preferred: str) -> None:
    assert make_vote(1, "ada", 0, choice, left_side).preferred == preferred


def test_durability_is_what_sqlite_offers_most_of(store: VoteStore) -> None:
    database = store._database
    assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert database.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL: flushed at every commit


def test_the_same_vote_twice_is_one_vote(store: VoteStore) -> None:
    vote = make_vote(1, "ada", 3, "left")
    assert store.record(vote)
    assert not store.record(vote)
    assert store.votes() == [vote]


def test_one_id_is_one_vote(store: VoteStore) -> None:
    store.record(make_vote(1, "ada", 3, "left"))
    with pytest.raises(VoteConflict, match="another vote"):
        store.record(make_vote(1, "ada", 3, "right"))


def test_a_rater_answers_a_pair_once(store: VoteStore) -> None:
    store.record(make_vote(1, "ada", 3, "left"))
    with pytest.raises(VoteConflict, match="already"):
        store.record(make_vote(2, "ada", 3, "left"))
    assert store.record(make_vote(3, "bob", 3, "right"))
    assert store.counts() == {3: 2}


def test_what_is_taken_back_can_be_given_again_and_a_late_copy_is_not_counted(store: VoteStore) -> None:
    first, second = make_vote(1, "ada", 3, "left"), make_vote(2, "ada", 3, "tie")
    store.record(first)
    assert store.undo("ada", first.id) == 3
    assert store.undo("ada", first.id) == 3
    assert store.votes() == []
    assert not store.record(first)
    assert store.votes() == []
    assert store.record(second)
    assert not store.record(first)
    assert store.votes() == [second]


def test_nobody_takes_back_anothers_vote(store: VoteStore) -> None:
    vote = make_vote(1, "ada", 3, "left")
    store.record(vote)
    with pytest.raises(VoteConflict, match="bob"):
        store.undo("bob", vote.id)
    assert store.votes() == [vote]


def test_skips_are_no_votes_but_are_not_asked_again(store: VoteStore) -> None:
    store.record(make_vote(1, "ada", 3, "skip"))
    store.record(make_vote(2, "ada", 1, "tie"))
    assert store.counts() == {1: 1}
    assert list(store.given_by("ada")) == [3, 1]


def test_case_makes_no_second_rater(store: VoteStore) -> None:
    store.record(make_vote(1, "Ada", 0, "left"))
    store.record(make_vote(2, "ada", 1, "left"))
    assert {vote.rater for vote in store.votes()} == {"Ada"}
    assert store.spelling("ADA") == "Ada"
    with pytest.raises(VoteConflict):
        store.record(make_vote(3, "ADA", 1, "right"))


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, "a\x00b", "\u202eeva"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidInputError, match="1 to 64 printable"):
        rater_name(name)


def test_composed_and_decomposed_letters_are_one_name() -> None:
    assert rater_name("Zoe\u0308") == rater_name("Zoë")


def test_other_items_are_refused(store: VoteStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = read_items(make_items(tmp_path / "other", 4))
    with pytest.raises(InvalidInputError, match=r"6 pairs of items.jsonl.*has 4"):
        store.bind(other)


def test_the_same_items_are_taken_from_another_place(store: VoteStore, items: Items, tmp_path: Path) -> None:
    assert store.items_path is not None
    assert store.items_path.resolve() == items.path.resolve()
    (tmp_path / "copy").mkdir()
    store.bind(read_items(make_items(tmp_path / "copy", 6)))


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, and long enough to be looked at as one" * 10)
    with pytest.raises(InvalidInputError, match=r"text\.sqlite cannot be used"):
        VoteStore(text)
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE addresses (name TEXT)")
    database.close()
    with pytest.raises(InvalidInputError, match="another program"):
        VoteStore(foreign)
    with pytest.raises(InvalidInputError, match="no folder"):
        VoteStore(tmp_path / "absent" / "votes.sqlite")


def test_another_schema_version_is_refused(store: VoteStore) -> None:
    with closing(sqlite3.connect(store.path)) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(InvalidInputError, match=r"schema version 7.*reads 1"):
        VoteStore(store.path)


def test_two_processes_at_once(store: VoteStore, reopened: Reopen) -> None:
    """Two connections, four threads each, who all want to answer the same pairs first."""
    stores = [store, reopened()]
    kept, refused = [], []

    def answer(thread: int) -> None:
        for pair in range(40):
            vote = make_vote(1000 * thread + pair, "ada", pair, "left")
            try:
                stores[thread % 2].record(vote)
                kept.append(vote.id)
            except VoteConflict:
                refused.append(vote.id)

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 40
    assert len(refused) == 280
    assert sorted(vote.pair for vote in reopened().votes()) == list(range(40))


WRITER = """
import sys
from dina_lrm.serving.labelling.store import Vote, VoteStore
store = VoteStore(sys.argv[1])
for number in range(10_000):
    vote = Vote(
        id=f"{number:032x}", rater="ada", pair=number, left_side="a", choice="left", seconds=1.0
    )
    store.record(vote)
    print(number, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_acknowledged(store: VoteStore, reopened: Reopen) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.stdout.close()
    writer.wait()
    kept = [vote.pair for vote in reopened().votes()]
    assert set(acknowledged) <= set(kept)
    assert len(kept) <= len(acknowledged) + 1  # one may have been committed and not yet told
    assert reopened()._database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_probabilities_belong_to_their_model(store: VoteStore, reopened: Reopen) -> None:
    store.add_probabilities("one", {0: 0.25, 4: 1.0})
    store.add_probabilities("two", {0: 0.75})
    store.add_probabilities("one", {4: 0.5})
    assert reopened().probabilities("one") == {0: 0.25, 4: 0.5}
    assert reopened().probabilities("three") == {}
