"""A row of preference data on its way to comparisons: its cells, its pictures, who won.

Every layout ends in `Row.compare`, so votes, ties, equal sides and missing pictures are read in one way.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dina_lrm.data.pairs import ImageSource, PreferencePair, Reject, load_image, same_picture
from dina_lrm.data.row import BadRow, shown
from dina_lrm.errors import InvalidInputError
from dina_lrm.files import file_fault

__all__ = [
    "Check",
    "Comparison",
    "ReadRow",
    "Row",
    "Votes",
    "image_cell",
    "number",
    "prompt_text",
    "share",
    "votes_of",
]

Check = Literal["none", "exists", "decode"]
"""How far a reader looks at images: not at all, whether they are there, whether they can be decoded."""

Votes = tuple[float, float]
"""For the side that the layout calls chosen, and for the other."""

MOST_VOTES = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two pictures for one prompt, and what raters said."""

    pair: PreferencePair
    confidence: float | None = None
    """That the preference is right, in [0, 1], as the data set states it."""
    generators: tuple[str | None, str | None] = (None, None)
    """What drew the chosen and the rejected picture."""
    chosen_was_first: bool | None = None
    """Whether the chosen side stood first (left, 0) before raters; None where the layout does not keep it."""
    row: int
    """Position of the row in the file, from 0."""
    line: int | None = None
    """Where the row begins in the file, from 1; None where the form has no lines."""
    file: str
    """The file it comes from, relative to the root."""

    def reject(self, reason: str) -> Reject:
        return Reject(row=self.row, line=self.line, reason=reason, prompt=self.pair.prompt, file=self.file)


@dataclass(frozen=True, slots=True)
class Row:
    """A row and where it came from."""

    values: Mapping[str, Any]
    index: int
    line: int | None
    file: str
    root: Path
    check: Check

    def read(self, read_row: "ReadRow") -> Iterator[Comparison | Reject]:
        """What a layout's reader gives; a row that is none of its layout is one reject."""
        try:
            yield from read_row(self)
        except BadRow as bad:
            yield self.reject(str(bad))

    def reject(self, reason: str) -> Reject:
        given = self.values.get("prompt") or self.values.get("caption")
        prompt = given if isinstance(given, str) else None
        return Reject(row=self.index, line=self.line, reason=reason, prompt=prompt, file=self.file)

    def prompt(self, field: str = "prompt") -> str:
        if field not in self.values:  # a header in capitals, say
            raise BadRow(f"no prompt: {field} is missing; the row has {shown(list(self.values))}")
        return prompt_text(self.values[field], field)

    def text(self, field: str) -> str | None:
        """None also for the string "null", which some of HPDv3's rows hold."""
        value = self.values.get(field)
        if value is None or value == "null":
            return None
        if not isinstance(value, str):
            raise BadRow(f"not text: {field} = {shown(value)}")
        return value

    def lists(self, images: str, ranks: str) -> tuple[Sequence[Any], list[float]]:
        """Pictures, and a number for each."""
        files, numbers = self.values.get(images), self.values.get(ranks)
        if not isinstance(files, list) or not isinstance(numbers, list) or len(files) != len(numbers):
            raise BadRow(f"{images} and {ranks}: need to be two lists of the same length")
        if len(files) < 2:
            raise BadRow(f"{images}: needs at least 2, has {len(files)}")
        return files, [number(value, f"{ranks}[{index}]") for index, value in enumerate(numbers)]

    def image(self, cell: Any, field: str, *folders: str) -> ImageSource | BadRow:
        """The picture in a cell: bytes, or a path under the root, looked for in `folders` too; or why there
        is none, which is told of the comparisons that need it and of no others."""
        if isinstance(cell, str) and cell and folders:
            places = [str(Path(folder) / cell) for folder in ("", *folders)]
            cell = next((place for place in places if file_fault(self.root / place) is None), places[1])
        try:
            return image_cell(cell, field, self.root, self.check)
        except BadRow as bad:
            return bad

    def compare(
        self,
        prompt: str,
        chosen: ImageSource | BadRow,
        rejected: ImageSource | BadRow,
        *,
        tie: bool = False,
        votes: Votes | None = None,
        generators: tuple[str | None, str | None] = (None, None),
        confidence: float | None = None,
        chosen_was_first: bool | None = None,
        source: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Comparison | Reject:
        """Two pictures of the row. The side with more votes becomes the chosen one, whatever the row calls
        it; even votes are a tie."""
        for side in (chosen, rejected):
            if isinstance(side, BadRow):
                return self.reject(str(side))
        assert not isinstance(chosen, BadRow)
        assert not isinstance(rejected, BadRow)
        if same_picture(chosen, rejected, look=self.check != "none"):
            name = chosen.name if isinstance(chosen, Path) else "equal bytes"
            return self.reject(f"same picture: on both sides, {name}")
        if votes is not None and votes[0] < votes[1]:
            chosen, rejected, votes = rejected, chosen, (votes[1], votes[0])
            generators = generators[1], generators[0]
            chosen_was_first = None if chosen_was_first is None else not chosen_was_first
        pair = PreferencePair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            votes_chosen=None if votes is None else votes[0],
            votes_rejected=None if votes is None else votes[1],
            tie=tie,
            source=source,
            width=width,
            height=height,
        )
        return Comparison(
            pair=pair,
            confidence=confidence,
            generators=generators,
            chosen_was_first=chosen_was_first,
            row=self.index,
            line=self.line,
            file=self.file,
        )

    def ranked(
        self,
        prompt: str,
        images: Sequence[ImageSource | BadRow],
        ranks: Sequence[float],
        *,
        positions: bool = True,
        **about: Any,
    ) -> Iterator[Comparison | Reject]:
        """Every two pictures of a ranked list: the lower rank is better, equal ranks are a tie.

        Args:
            positions: raters saw the list in this order.
        """
        for i, j in itertools.combinations(range(len(images)), 2):
            first = ranks[i] <= ranks[j]
            better, worse = (i, j) if first else (j, i)
            yield self.compare(
                prompt,
                images[better],
                images[worse],
                tie=ranks[i] == ranks[j],
                chosen_was_first=first if positions else None,
                **about,
            )


ReadRow = Callable[[Row], Iterator[Comparison | Reject]]
"""A layout: what a row's cells mean."""


# --- cells -------------------------------------------------------------------------------------------------


def prompt_text(value: Any, field: str = "prompt") -> str:
    """A prompt in a field of a row."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no prompt: {field} = {shown(value)}")
    return value


def image_cell(cell: Any, field: str, root: Path, check: Check) -> ImageSource:
    """The picture that a cell of a row names or holds, looked at as far as `check` says."""
    if isinstance(cell, Mapping):  # the image cell of Hugging Face datasets
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        path = root / cell  # which is `cell` where that is absolute
        if check != "none" and (fault := file_fault(path)) is not None:
            missing = fault == "is missing"
            raise BadRow(
                f"missing file: {field} = {cell}" if missing else f"no file: {field} = {cell} {fault}"
            )
        source: ImageSource = path
    elif isinstance(cell, bytes) and cell:
        source = cell
    else:
        raise BadRow(f"no image: {field} is {'missing' if cell is None else type(cell).__name__}")
    if check == "decode":
        try:
            load_image(source)
        except InvalidInputError as error:
            raise BadRow(f"{error} in {field}") from error
    return source


def number(value: Any, field: str) -> float:
    """A finite number in a field of a row."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            given = float(value)
        except OverflowError:
            given = math.inf
        if math.isfinite(given):
            return given
    raise BadRow(f"not a number: {field} = {shown(value)}")


def share(value: Any, field: str) -> float | None:
    """A number in [0, 1], or None where none is stated."""
    if value is None or value == "null":
        return None
    given = number(value, field)
    if not 0 <= given <= 1:
        raise BadRow(f"{field}: {given:g} is outside [0, 1]")
    return given


def votes_of(chosen: Any, rejected: Any) -> Votes:
    """Votes for either side as a row states them."""
    votes = number(chosen, "votes_chosen"), number(rejected, "votes_rejected")
    if min(votes) < 0 or max(votes) == 0 or max(votes) > MOST_VOTES:
        allowed = f"must be from 0 to {MOST_VOTES:g}, and not both 0"
        raise BadRow(f"votes: {votes[0]:g} and {votes[1]:g} {allowed}")
    return votes
