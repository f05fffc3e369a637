"""What a run over many rows is told. Each setting stands here once; commands and workers embed these."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from dina_lrm.errors import InvalidInputError
from dina_lrm.models.options import ModelOptions

__all__ = ["COMPARE", "SCORE", "BulkJob", "Scoring", "Task", "Viewing"]


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """The noise through which the pictures are looked at."""

    noise_levels: tuple[float, ...] = ()
    """Noise levels in [0, 1]: 0 is clean, 1 is pure noise, several are one ensemble. By default the levels
    that the reward was chosen with."""
    num_draws: int = 1
    """Noise draws to average over. With more than one a score has a standard error."""
    seed: int = 0
    """Seed of the noise. The result of a picture depends on it, and not on what is scored beside it."""
    batch_size: int = 16
    """Pictures, or pairs of them, in memory at once."""

    def __post_init__(self) -> None:
        for name in ("num_draws", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not -(2**63) <= self.seed < 2**64:
            raise InvalidInputError(f"seed = {self.seed}: must be from -2^63 to 2^64 - 1")

    def levels(self, default: Sequence[float]) -> float | list[float]:
        """What the scoring methods take: one level as a number, several as one ensemble."""
        levels = self.noise_levels or tuple(default)
        return levels[0] if len(levels) == 1 else list(levels)

    def scoring(self) -> "Scoring":
        """The same for scores."""
        return Scoring(**{one.name: getattr(self, one.name) for one in fields(Viewing)})


@dataclass(frozen=True, kw_only=True)
class Scoring(Viewing):
    """How pictures are scored."""

    target_error: float | None = None
    """Draw as often as each picture needs for this standard error, from 5 to --max-draws times, instead of
    --num-draws times."""
    max_draws: int = 64
    """Most noise draws of one picture with --target-error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_error is not None and not (self.target_error > 0 and self.max_draws >= 2):
            raise InvalidInputError(
                f"target_error = {self.target_error:g} with max_draws = {self.max_draws}: need a target "
                "above 0 and at least 2 draws"
            )
        if self.target_error is not None and self.num_draws != 1:
            raise InvalidInputError(
                f"target_error = {self.target_error:g} and num_draws = {self.num_draws} exclude each other: "
                "give the error that is wanted, or the number of draws"
            )


@dataclass(frozen=True)
class Task:
    """What is asked of a row: its columns with pictures, and the columns that answer."""

    name: Literal["score", "compare"]
    pictures: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have."""
        return ("prompt", *self.pictures)


SCORE = Task("score", ("image",), ("score", "standard_error"))
COMPARE = Task("compare", ("image_a", "image_b"), ("probability_a_preferred",))


@dataclass(frozen=True, kw_only=True)
class BulkJob:
    """What is to be scored, with what, and where the results go."""

    input: str
    """A file of rows, a folder of them, or a pattern; a path or a URL such as s3://."""
    output: str
    """Folder; a path or a URL."""
    reward: ModelOptions = field(default_factory=ModelOptions)
    scoring: Scoring = field(default_factory=Scoring)
    """Without noise levels: the reward's own."""
    task: Task = SCORE
    rows_per_part: int = 1000
    """Also what is lost, at most, when a process dies."""

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise InvalidInputError(f"rows_per_part = {self.rows_per_part}: must be at least 1")
