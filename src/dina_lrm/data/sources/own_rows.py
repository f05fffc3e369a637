"""Our own preference rows: what is in one, and a file of them as pairs.

A row holds `prompt` and either `chosen`, `rejected` (a path, or bytes in parquet) or `images` + `ranks`
(1 is best, as in ImageReward and HPDv2); optionally `votes_chosen`, `votes_rejected`, `source`, `width`,
`height`. A row that cannot be used never stops a run and never vanishes: it is counted and listed with
its reason. Forms of files: `data.rows`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dina_lrm.data.comparisons import Check, Comparison, ReadRow, Row, number, votes_of
from dina_lrm.data.pairs import PreferencePair, Reject, write_rejects
from dina_lrm.data.row import BadRow
from dina_lrm.data.rows import rows_of_file

__all__ = ["TIE", "PairRows", "own_row", "read_file", "read_pairs"]

TIE = "tie: nobody won"
"""Why a tie is a reject where a strict order is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRows:
    """What a file of rows held: the pairs, the rejects, and the number of rows read."""

    pairs: list[PreferencePair]
    rejects: list[Reject]
    num_rows: int

    def summary(self) -> str:
        """One line for a log: how many pairs, and rejects counted by the start of their reason."""
        line = f"{len(self.pairs)} pairs from {self.num_rows} rows"
        if self.rejects:
            counts = Counter(reject.reason.split(":")[0] for reject in self.rejects)
            line += f", {len(self.rejects)} rejected ("
            line += ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) + ")"
        return line


def read_pairs(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    check_images: bool = True,
    ties: Literal["reject", "half"] = "reject",
    rejects_file: str | Path | None = None,
) -> PairRows:
    """Read our own preference rows from `path`, as `read_source("jsonl", path)` does.

    Args:
        path: the file of rows.
        image_root: folder that relative image paths start from; None is the folder of `path`.
        check_images: decode every image now, so that an unreadable one is a reject here and not later;
            False looks only whether files exist.
        ties: pairs with even votes or equal ranks: rejects, or kept with a target of one half.
        rejects_file: where to list rejects as jsonl; written only when there are any.

    A row of `images` + `ranks` gives one pair for every two images. Where `rejected` has more votes, the
    sides are exchanged.

    Raises:
        InvalidInputError: no such file, or another form.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    pairs: list[PreferencePair] = []
    rejects: list[Reject] = []
    rows: set[int] = set()
    check: Check = "decode" if check_images else "exists"
    for item in read_file(path, own_row, name=path.name, root=root, check=check):
        rows.add(item.row)
        if isinstance(item, Comparison) and item.pair.tie and ties == "reject":
            item = item.reject(TIE)
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            pairs.append(item.pair)
    if rejects_file is not None and rejects:
        write_rejects(rejects, rejects_file)
    return PairRows(pairs=pairs, rejects=rejects, num_rows=len(rows))


def read_file(
    file: Path, read_row: ReadRow, *, name: str, root: Path, check: Check
) -> Iterator[Comparison | Reject]:
    """Comparisons of a file of rows in some layout.

    Args:
        name: what comparisons and rejects call the file.
        root: of relative paths.
    """
    for found in rows_of_file(file):
        if isinstance(found.values, BadRow):
            yield Reject(row=found.index, line=found.line, reason=str(found.values), file=name)
        else:
            yield from Row(found.values, found.index, found.line, name, root, check).read(read_row)


def own_row(row: Row) -> Iterator[Comparison | Reject]:
    """One comparison of `chosen` and `rejected`, or every two of `images`."""
    values, prompt = row.values, row.prompt()
    about: dict[str, Any] = {"source": row.text("source")}
    about |= {field: _whole(row, field) for field in ("width", "height")}
    is_pair = values.get("chosen") is not None or values.get("rejected") is not None
    is_group = values.get("images") is not None or values.get("ranks") is not None
    if is_pair == is_group:
        raise BadRow(
            "needs chosen and rejected, or images and ranks: has " + ("both" if is_pair else "neither")
        )
    if is_pair:
        votes = [values.get(field) for field in ("votes_chosen", "votes_rejected")]
        sides = [row.image(values.get(side), side) for side in ("chosen", "rejected")]
        yield row.compare(prompt, *sides, votes=None if votes == [None, None] else votes_of(*votes), **about)
    else:
        cells, ranks = row.lists("images", "ranks")
        images = [row.image(cell, f"images[{index}]") for index, cell in enumerate(cells)]
        yield from row.ranked(prompt, images, ranks, positions=False, **about)


def _whole(row: Row, field: str) -> int | None:
    value = row.values.get(field)
    return None if value is None else int(number(value, field))
