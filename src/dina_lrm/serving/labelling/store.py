"""Votes in one SQLite file: one that was acknowledged survives a killed process and a power cut.

The journal is a write-ahead log that is flushed to disk at every commit, a vote is one transaction, and
`VoteStore.record` returns after the commit. The id of a vote is made where the vote is given, so that sending
it again changes nothing. A vote that was taken back stays in the file, marked as such, and a late copy of it
is not counted.
"""

import contextlib
import os
import secrets
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dina_lrm.errors import InvalidInputError
from dina_lrm.serving.labelling.items import Items

__all__ = ["Choice", "Vote", "VoteConflict", "VoteStore", "rater_name"]

SCHEMA_VERSION = 1
APPLICATION_ID = 0x44694E61
"""Marks the file as one of ours: "DiNa"."""
MAX_NAME = 64
"""Characters of a rater's name."""

Choice = Literal["left", "right", "tie", "skip"]

_SCHEMA = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE votes (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        rater TEXT NOT NULL,
        pair INTEGER NOT NULL,
        left_side TEXT NOT NULL CHECK (left_side IN ('a', 'b')),
        choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'skip')),
        seconds REAL NOT NULL,
        given_at TEXT NOT NULL,
        undone_at TEXT
    )""",
    "CREATE UNIQUE INDEX one_vote_each ON votes (rater, pair) WHERE undone_at IS NULL",
    """CREATE TABLE probabilities (
        model TEXT NOT NULL, pair INTEGER NOT NULL, probability REAL NOT NULL, PRIMARY KEY (model, pair)
    ) WITHOUT ROWID""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_COLUMNS = "id, rater, pair, left_side, choice, seconds"


class VoteConflict(InvalidInputError):
    """A vote that contradicts one that was kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """What one rater said about one pair."""

    id: str
    """Made by the browser; the same vote sent twice has the same id."""
    rater: str
    pair: int
    """Position in `Items.pairs`."""
    left_side: Literal["a", "b"]
    """Which picture stood on the left."""
    choice: Choice
    seconds: float
    """From the moment both pictures were seen to the choice."""

    @property
    def preferred(self) -> Literal["a", "b", "tie"] | None:
        """The answer, wherever the pictures stood; None for a skip."""
        match self.choice:
            case "left":
                return self.left_side
            case "right":
                return "b" if self.left_side == "a" else "a"
            case "tie":
                return "tie"
            case "skip":
                return None


def rater_name(text: str) -> str:
    """A name as it is kept: composed characters, single spaces.

    Raises:
        InvalidInputError: nothing is left, it is longer than 64 characters, or not printable.

    >>> rater_name("  Ada   Lovelace ")
    'Ada Lovelace'
    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidInputError(f"a rater's name has 1 to {MAX_NAME} printable characters; got {text[:80]!r}")
    return name


class VoteStore:
    """The votes on one set of items; any number of threads, and of processes, may use one file at a time."""

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it.

        Raises:
            InvalidInputError: it is no file of votes, or was written by another version.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.parent.is_dir():
            raise InvalidInputError(f"no folder {self.path.parent} to keep votes in")
        try:
            self._database = sqlite3.connect(
                self.path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except sqlite3.Error as error:
            raise InvalidInputError(f"{self.path} cannot be used as a file of votes: {error}") from error

    def _prepare(self) -> None:
        database = self._database
        application, version, tables = (
            database.execute(query).fetchone()[0]
            for query in (
                "PRAGMA application_id",
                "PRAGMA user_version",
                "SELECT count(*) FROM sqlite_schema",
            )
        )
        if tables and application != APPLICATION_ID:
            raise InvalidInputError(f"{self.path} is a database of another program, not a file of votes")
        if tables and version != SCHEMA_VERSION:
            raise InvalidInputError(
                f"{self.path} has schema version {version}; this version of dina-lrm reads {SCHEMA_VERSION}"
            )
        mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise InvalidInputError(
                f"{self.path} lies where no write-ahead log can be kept: use a local disk"
            )
        database.execute("PRAGMA synchronous = FULL")
        with self._transaction():
            if not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                for statement in _SCHEMA:
                    database.execute(statement)

    def close(self) -> None:
        self._database.close()

    def bind(self, items: Items) -> None:
        """Make this the file of votes on `items`, or see that it is.

        Raises:
            InvalidInputError: it holds votes on other items.
        """
        place = os.path.relpath(items.path.resolve(), self.path.resolve().parent)
        about = {"items": items.fingerprint, "pairs": str(len(items.pairs)), "path": Path(place).as_posix()}
        with self._transaction() as database:
            known = dict(database.execute("SELECT name, value FROM about"))
            if "items" not in known:
                database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            elif known["items"] != items.fingerprint:
                raise InvalidInputError(
                    f"{self.path} holds votes on other items: {known['pairs']} pairs of {known['path']}, "
                    f"and {items.path} has {len(items.pairs)} that differ in prompts, pictures or order; "
                    "name another file"
                )

    @property
    def results_key(self) -> str:
        """Opens the page of results; made with the file of votes, so that a link to it lasts."""
        with self._transaction() as database:
            new = secrets.token_urlsafe(16)
            database.execute("INSERT OR IGNORE INTO about VALUES ('results_key', ?)", (new,))
            row = database.execute("SELECT value FROM about WHERE name = 'results_key'").fetchone()
        return row[0]

    def check(self) -> None:
        """See that votes can be read and written.

        Raises:
            sqlite3.Error: they cannot.
        """
        with self._transaction() as database:
            database.execute("SELECT count(*) FROM about").fetchone()

    @property
    def items_path(self) -> Path | None:
        """Where the items lay when the file was made; None where it never got any."""
        with self._reading() as database:
            row = database.execute("SELECT value FROM about WHERE name = 'path'").fetchone()
        return None if row is None else self.path.parent / row[0]

    # --- votes ---------------------------------------------------------------------------------------------

    def record(self, vote: Vote) -> bool:
        """Keep a vote; it is on disk when this returns.

        Returns:
            Whether it is new: False where this very vote was kept before, even if it was taken back since.

        Raises:
            VoteConflict: its id belongs to another vote, or the rater has voted on the pair.
        """
        with self._transaction() as database:
            vote = replace(vote, rater=_spelling(database, vote.rater))
            same = database.execute(f"SELECT {_COLUMNS} FROM votes WHERE id = ?", (vote.id,)).fetchone()
            if same is not None:
                if _vote(same) != vote:
                    raise VoteConflict(f"the id {vote.id} belongs to another vote")
                return False
            place = vote.rater, vote.pair
            where = "WHERE rater = ? AND pair = ? AND undone_at IS NULL"
            if database.execute(f"SELECT 1 FROM votes {where}", place).fetchone():
                raise VoteConflict(f"{vote.rater} has answered this pair already, perhaps in another window")
            database.execute(
                f"INSERT INTO votes ({_COLUMNS}, given_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (vote.id, *place, vote.left_side, vote.choice, vote.seconds, _now()),
            )
        return True

    def undo(self, rater: str, vote_id: str) -> int:
        """Take a vote back, and say which pair it was on; taking it back twice changes nothing.

        Raises:
            VoteConflict: this rater gave no such vote.
        """
        with self._transaction() as database:
            key = vote_id, _spelling(database, rater)
            row = database.execute("SELECT pair FROM votes WHERE id = ? AND rater = ?", key).fetchone()
            if row is None:
                raise VoteConflict(f"{rater} gave no vote with the id {vote_id}")
            database.execute(
                "UPDATE votes SET undone_at = ? WHERE id = ? AND undone_at IS NULL", (_now(), vote_id)
            )
        return row[0]

    def votes(self) -> list[Vote]:
        """All that count, in the order they were given."""
        return [vote for vote, _ in self.dated_votes()]

    def dated_votes(self) -> list[tuple[Vote, str]]:
        """All that count, in the order they were given, each with its time (UTC, ISO 8601)."""
        with self._reading() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS}, given_at FROM votes WHERE undone_at IS NULL ORDER BY number"
            ).fetchall()
        return [(_vote(row), given_at) for *row, given_at in rows]

    def spelling(self, rater: str) -> str:
        """A name as it was first written: upper and lower case make no second rater."""
        with self._reading() as database:
            return _spelling(database, rater)

    def counts(self) -> dict[int, int]:
        """Votes on each pair that has any, skips not among them."""
        with self._reading() as database:
            return dict(
                database.execute(
                    "SELECT pair, count(*) FROM votes "
                    "WHERE undone_at IS NULL AND choice != 'skip' GROUP BY pair"
                ).fetchall()
            )

    def given_by(self, rater: str) -> dict[int, str]:
        """Pair and id of each vote of a rater, skips among them, the last one at the end."""
        with self._reading() as database:
            return dict(
                database.execute(
                    "SELECT pair, id FROM votes WHERE rater = ? AND undone_at IS NULL ORDER BY number",
                    (_spelling(database, rater),),
                ).fetchall()
            )

    # --- probabilities -------------------------------------------------------------------------------------

    def probabilities(self, model: str) -> dict[int, float]:
        """P(a preferred to b) of the pairs that a model was asked about."""
        with self._reading() as database:
            return dict(
                database.execute(
                    "SELECT pair, probability FROM probabilities WHERE model = ?", (model,)
                ).fetchall()
            )

    def add_probabilities(self, model: str, found: Mapping[int, float]) -> None:
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO probabilities VALUES (?, ?, ?)",
                [(model, pair, probability) for pair, probability in found.items()],
            )

    # --- the connection ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._database

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


def _vote(row: Sequence[Any]) -> Vote:
    names = ("id", "rater", "pair", "left_side", "choice", "seconds")
    return Vote(**dict(zip(names, row, strict=True)))


def _spelling(database: sqlite3.Connection, rater: str) -> str:
    names = database.execute("SELECT rater FROM votes GROUP BY rater ORDER BY min(number)")
    return next((name for (name,) in names if name.casefold() == rater.casefold()), rater)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
