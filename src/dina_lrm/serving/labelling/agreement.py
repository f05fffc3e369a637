"""What the votes say about the raters: do they agree, how often nobody wins, does a side attract."""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nltk.metrics.agreement import AnnotationTask
from scipy.stats import binomtest

from dina_lrm.serving.labelling.store import Vote

__all__ = ["RaterResults", "Results", "Share", "nominal_alpha", "results", "vote_agreement"]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a count, with its 95 % interval (Wilson)."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: int, count: int) -> "Share | None":
        """None where there is nothing to take a share of."""
        if count == 0:
            return None
        interval = binomtest(hits, count).proportion_ci(method="wilson")
        return cls(hits / count, float(interval.low), float(interval.high), count)


@dataclass(frozen=True, kw_only=True, slots=True)
class RaterResults:
    """One rater's votes."""

    rater: str
    votes: int
    """Left, right or tie."""
    ties: int
    skips: int
    left: Share | None
    """Left, of left and right."""
    median_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All votes together."""

    votes: int
    """Left, right or tie."""
    skips: int
    ties: Share | None
    """Share of ties among the votes."""
    left: Share | None
    """Left, of left and right. The sides are drawn at random, so a half is expected of raters who look at
    the pictures alone."""
    agreement: float | None
    """`vote_agreement`."""
    alpha: float | None
    """`nominal_alpha`."""
    raters: list[RaterResults]


def results(votes: Sequence[Vote]) -> Results:
    """Counts and shares of the votes that are given."""
    by_rater: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    counts = Counter(vote.choice for vote in votes)
    answered = len(votes) - counts["skip"]
    return Results(
        votes=answered,
        skips=counts["skip"],
        ties=Share.of(counts["tie"], answered),
        left=Share.of(counts["left"], counts["left"] + counts["right"]),
        agreement=vote_agreement(votes),
        alpha=nominal_alpha(votes),
        raters=[_rater(rater, by_rater[rater]) for rater in sorted(by_rater)],
    )


def vote_agreement(votes: Sequence[Vote]) -> float | None:
    """Share of equal answers among every two votes on one pair; ties are an answer, skips are none.

    None where no pair has two votes. A coin among left and right agrees half of the time.
    """
    counts = [Counter(answers) for answers in _answers(votes).values()]
    together = sum(count.total() * (count.total() - 1) for count in counts)
    equal = sum(times * (times - 1) for count in counts for times in count.values())
    return equal / together if together else None


def nominal_alpha(votes: Sequence[Vote]) -> float | None:
    """Krippendorff's alpha for the answers a, b and tie: 1 is full agreement, 0 is what chance gives.

    Raters may have answered different pairs, and any number of them. None where no pair has two votes, or
    where those votes are all the same answer, so that chance alone would agree.
    """
    several = {pair: answers for pair, answers in _answers(votes).items() if len(answers) > 1}
    if len(set(itertools.chain.from_iterable(several.values()))) < 2:
        return None
    ratings = [
        (number, pair, answer) for pair, answers in several.items() for number, answer in enumerate(answers)
    ]  # alpha knows raters only by their answers to one pair
    return float(AnnotationTask(ratings).alpha())


def _answers(votes: Sequence[Vote]) -> dict[int, list[str]]:
    answers: dict[int, list[str]] = defaultdict(list)
    for vote in votes:
        if vote.preferred is not None:
            answers[vote.pair].append(vote.preferred)
    return answers


def _rater(rater: str, votes: Sequence[Vote]) -> RaterResults:
    counts = Counter(vote.choice for vote in votes)
    return RaterResults(
        rater=rater,
        votes=len(votes) - counts["skip"],
        ties=counts["tie"],
        skips=counts["skip"],
        left=Share.of(counts["left"], counts["left"] + counts["right"]),
        median_seconds=statistics.median(vote.seconds for vote in votes),
    )
