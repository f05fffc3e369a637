"""Votes as preference rows, what `dina-lrm inspect`, `prepare jsonl` and `train` read; or one by one."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_lrm.data.pairs import ImageSource
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import atomic_path
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import Vote, VoteStore

__all__ = ["Exported", "export_single_votes", "export_votes"]

SOURCE = "label"
"""Stated for items that name no source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What an export wrote, and every vote that went into it or did not."""

    rows: int
    """Pairs with at least one vote."""
    pairs: int
    """Pairs of the items."""
    raters: int
    preferences: int
    """Votes for one of the pictures."""
    ties: int
    """Each is half a vote for either picture."""
    skips: int
    """In no row."""
    even: int
    """Rows with as many votes for one as for the other: which one they name `chosen` means nothing."""


def export_votes(votes: str | Path, output: str | Path, items: str | Path | None = None) -> Exported:
    """Write a row for each pair with votes, in the order of the items.

    Args:
        votes: the SQLite file.
        output: .jsonl with paths relative to its folder, or .parquet, which also takes pictures that lie in
            the table of the items.
        items: where the items lie now; None: where they lay when the votes were begun.

    Raises:
        InvalidInputError: no votes, other items, or pictures that the output cannot hold.
    """
    found, dated = _read(Path(votes), Path(output), items)
    given = [vote for vote, _ in dated]
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for vote in given:
        counts[vote.pair][vote.preferred or "skip"] += 1
    total = sum(counts.values(), Counter())
    rows = list(_rows(found, counts))
    if not rows:
        raise InvalidInputError(f"{votes} holds no votes; pairs that were skipped: {total['skip']}")
    _write(rows, Path(output), pictures=("chosen", "rejected"))
    return Exported(
        rows=len(rows),
        pairs=len(found.pairs),
        raters=len({vote.rater for vote in given if vote.preferred is not None}),
        preferences=total["a"] + total["b"],
        ties=total["tie"],
        skips=total["skip"],
        even=sum(row["votes_chosen"] == row["votes_rejected"] for row in rows),
    )


def export_single_votes(votes: str | Path, output: str | Path, items: str | Path | None = None) -> int:
    """Write a row for each vote, skips among them, in the order they were given, and say how many.

    A row has `prompt`, the pictures `left` and `right` as the rater saw them, `choice` (left, right, tie or
    skip), `rater`, `given_at` (UTC, ISO 8601), `seconds` to the choice, `pair` (its number among the items,
    from 0), `vote` (an id) and `source`. Votes that were taken back are in no row.

    Args, Raises: as in `export_votes`.
    """
    found, dated = _read(Path(votes), Path(output), items)
    rows = []
    for vote, given_at in dated:
        pair = found.pairs[vote.pair]
        left, right = (pair.a, pair.b) if vote.left_side == "a" else (pair.b, pair.a)
        rows.append(
            {
                "prompt": pair.prompt,
                "left": found.pictures[left],
                "right": found.pictures[right],
                "choice": vote.choice,
                "rater": vote.rater,
                "given_at": given_at,
                "seconds": vote.seconds,
                "pair": vote.pair,
                "vote": vote.id,
                "source": pair.source or SOURCE,
            }
        )
    if not rows:
        raise InvalidInputError(f"{votes} holds no votes")
    _write(rows, Path(output), pictures=("left", "right"))
    return len(rows)


def _read(votes: Path, output: Path, items: str | Path | None) -> tuple[Items, list[tuple[Vote, str]]]:
    """The items, and the votes on them with their times."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise InvalidInputError(f"rows are written as .jsonl or .parquet; got {output}")
    if not votes.is_file():
        raise InvalidInputError(f"no file of votes at {votes}")
    if votes.stat().st_size == 0:  # SQLite would make a database of it
        raise InvalidInputError(f"{votes} is empty: it holds no votes")
    store = VoteStore(votes)
    try:
        path = items if items is not None else store.items_path
        if path is None:
            raise InvalidInputError(f"{votes} holds no votes")
        found = read_items(path)
        store.bind(found)
        for used in (votes, found.path):
            if output.exists() and output.samefile(used):
                raise InvalidInputError(f"{output} is what is read: name another file to write")
        return found, store.dated_votes()
    finally:
        store.close()


def _rows(items: Items, counts: dict[int, Counter[str]]) -> Iterator[dict[str, Any]]:
    for index, pair in enumerate(items.pairs):
        count = counts[index]
        votes_a, votes_b = (count[side] + count["tie"] / 2 for side in ("a", "b"))
        if votes_a + votes_b == 0:
            continue
        sides = [(votes_a, pair.a), (votes_b, pair.b)]
        (votes_chosen, chosen), (votes_rejected, rejected) = sides if votes_a >= votes_b else sides[::-1]
        yield {
            "prompt": pair.prompt,
            "chosen": items.pictures[chosen],
            "rejected": items.pictures[rejected],
            "votes_chosen": votes_chosen,
            "votes_rejected": votes_rejected,
            "source": pair.source or SOURCE,
        }


def _write(rows: list[dict[str, Any]], output: Path, pictures: tuple[str, str]) -> None:
    """Rows as .jsonl or .parquet; `pictures` are the columns that hold some."""
    with atomic_path(output) as partial:
        if output.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    cells = {name: _path(row[name], output) for name in pictures}
                    file.write(json.dumps(row | cells, ensure_ascii=False) + "\n")
        else:
            _write_parquet(rows, partial, output, pictures)


def _write_parquet(
    rows: list[dict[str, Any]], partial: Path, output: Path, pictures: tuple[str, str]
) -> None:
    """Pictures are image cells as in Hugging Face datasets: bytes, or a path."""
    import pyarrow
    import pyarrow.parquet as parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    columns = {name: picture if name in pictures else kinds[type(value)] for name, value in rows[0].items()}
    filled = [row | {name: _cell(row[name], output) for name in pictures} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(filled, schema=pyarrow.schema(columns)), partial)


def _cell(picture: ImageSource, output: Path) -> dict[str, Any]:
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    return {"bytes": None, "path": _path(picture, output)}


def _path(picture: ImageSource, output: Path) -> str:
    if not isinstance(picture, Path):
        raise InvalidInputError(f"the pictures lie in the table of the items: write {output.stem}.parquet")
    return Path(os.path.relpath(picture.resolve(), output.resolve().parent)).as_posix()
