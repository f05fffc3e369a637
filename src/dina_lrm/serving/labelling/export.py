"""Votes as preference rows: what `dina-lrm inspect`, `prepare jsonl` and `train` read."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dina_lrm.data.pairs import ImageSource
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import written_aside
from dina_lrm.serving.labelling.items import Items, read_items
from dina_lrm.serving.labelling.store import VoteStore

__all__ = ["Exported", "export_votes"]

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
    votes, output = Path(votes), Path(output)
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
        counts: dict[int, Counter[str]] = defaultdict(Counter)
        given = store.votes()
    finally:
        store.close()
    for vote in given:
        counts[vote.pair][vote.preferred or "skip"] += 1
    total = sum(counts.values(), Counter())
    rows = list(_rows(found, counts))
    if not rows:
        raise InvalidInputError(f"{votes} holds no votes; pairs that were skipped: {total['skip']}")
    with written_aside(output) as partial:
        if output.suffix == ".jsonl":
            _write_jsonl(rows, partial, output)
        else:
            _write_parquet(rows, partial, output)
    return Exported(
        rows=len(rows),
        pairs=len(found.pairs),
        raters=len({vote.rater for vote in given if vote.preferred is not None}),
        preferences=total["a"] + total["b"],
        ties=total["tie"],
        skips=total["skip"],
        even=sum(row["votes_chosen"] == row["votes_rejected"] for row in rows),
    )


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


def _write_jsonl(rows: list[dict[str, Any]], partial: Path, output: Path) -> None:
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            cells = {name: _path(row[name], output) for name in ("chosen", "rejected")}
            file.write(json.dumps(row | cells, ensure_ascii=False) + "\n")


def _write_parquet(rows: list[dict[str, Any]], partial: Path, output: Path) -> None:
    """Pictures are image cells as in Hugging Face datasets: bytes, or a path."""
    import pyarrow
    import pyarrow.parquet as parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    text, number = pyarrow.string(), pyarrow.float64()
    columns = {"prompt": text, "chosen": picture, "rejected": picture}
    columns |= {"votes_chosen": number, "votes_rejected": number, "source": text}
    filled = [row | {name: _cell(row[name], output) for name in ("chosen", "rejected")} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(filled, schema=pyarrow.schema(columns)), partial)


def _cell(picture: ImageSource, output: Path) -> dict[str, Any]:
    if isinstance(picture, bytes):
        return {"bytes": picture, "path": None}
    return {"bytes": None, "path": _path(picture, output)}


def _path(picture: ImageSource, output: Path) -> str:
    if not isinstance(picture, Path):
        raise InvalidInputError(f"the pictures lie in the table of the items: write {output.stem}.parquet")
    return Path(os.path.relpath(picture.resolve(), output.resolve().parent)).as_posix()
