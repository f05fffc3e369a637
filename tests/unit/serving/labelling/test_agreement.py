"""Agreement and shares, worked out by hand."""

import pytest

from dina_lrm.serving.labelling.agreement import Share, nominal_alpha, results, vote_agreement
from dina_lrm.serving.labelling.store import Vote
from tests.unit.serving.labelling.conftest import make_vote

CHOICES = {"a": "left", "b": "right", "tie": "tie", "skip": "skip"}


def votes_of(*answers: dict[str, str]) -> list[Vote]:
    """One dict a pair: rater to answer, with `a` on the left."""
    flat = [(rater, pair, given) for pair, each in enumerate(answers) for rater, given in each.items()]
    return [make_vote(n, rater, pair, CHOICES[given]) for n, (rater, pair, given) in enumerate(flat)]


def test_by_hand() -> None:
    """Pairs aa, ab, bb, and one with a single vote, which is left out of both.

    Equal answers: 2 of 3. Alpha: 6 answers, 3 a and 3 b. Observed disagreement: the two ordered pairs of ab,
    of 6 answers, 1/3. Expected: 2 * 3 * 3 of 6 * 5 ordered pairs, 3/5. Alpha = 1 - (1/3) / (3/5) = 4/9.
    """
    votes = votes_of(
        {"ada": "a", "bob": "a"}, {"ada": "a", "bob": "b"}, {"bob": "b", "eve": "b"}, {"ada": "tie"}
    )
    assert vote_agreement(votes) == pytest.approx(2 / 3, abs=1e-12)
    assert nominal_alpha(votes) == pytest.approx(4 / 9, abs=1e-12)


def test_missing_answers_against_the_coincidence_matrix() -> None:
    """Four raters, twelve pairs, some answered by two or three: alpha from the matrix of coincidences, as in
    Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C."""
    rows = [
        "a b t t b a a a b - - -",
        "a b t t b b a b b t - t",
        "- t t t b t a b b t a -",
        "a b t t b a a a b t a -",
    ]
    letters = {"a": "a", "b": "b", "t": "tie"}
    answers = [
        {str(rater): letters[cell] for rater, cell in enumerate(column) if cell != "-"}
        for column in zip(*(row.split() for row in rows), strict=True)
    ]
    coincidence = {(c, k): 0.0 for c in letters.values() for k in letters.values()}
    for unit in answers:
        given = list(unit.values())
        for i, c in enumerate(given):
            for j, k in enumerate(given):
                if i != j:
                    coincidence[c, k] += 1 / (len(given) - 1)
    totals = {c: sum(coincidence[c, k] for k in letters.values()) for c in letters.values()}
    n = sum(totals.values())
    observed = sum(value for (c, k), value in coincidence.items() if c != k)
    expected = sum(totals[c] * totals[k] for c, k in coincidence if c != k) / (n - 1)
    assert nominal_alpha(votes_of(*answers)) == pytest.approx(1 - observed / expected, abs=1e-12)


def test_full_agreement_is_one_and_opposition_is_below_zero() -> None:
    assert nominal_alpha(votes_of({"x": "a", "y": "a"}, {"x": "b", "y": "b"})) == pytest.approx(1)
    opposed = votes_of({"x": "a", "y": "b"}, {"x": "b", "y": "a"})
    assert vote_agreement(opposed) == 0
    assert nominal_alpha(opposed) == pytest.approx(1 - 1 / (2 * 2 * 2 / (4 * 3)), abs=1e-12)  # -0.5


@pytest.mark.parametrize(
    ("answers", "agreement"),
    [
        ([], None),
        ([{"x": "a"}, {"y": "b"}], None),
        ([{"x": "a", "y": "skip"}], None),
        ([{"x": "a", "y": "a"}, {"x": "a", "y": "a"}], 1.0),  # chance alone would agree
        ([{"x": "tie", "y": "tie"}, {"x": "b"}], 1.0),
    ],
)
def test_where_alpha_is_not_defined(answers: list[dict[str, str]], agreement: float | None) -> None:
    votes = votes_of(*answers)
    assert vote_agreement(votes) == agreement
    assert nominal_alpha(votes) is None


def test_agreement_is_about_pictures_and_not_about_sides() -> None:
    votes = [make_vote(0, "x", 0, "left", "a"), make_vote(1, "y", 0, "right", "b")]
    assert vote_agreement(votes) == 1
    assert results(votes).left == Share.of(1, 2)


def test_three_raters_on_one_pair() -> None:
    """a, a, b: of three ways to take two votes, one agrees."""
    assert vote_agreement(votes_of({"x": "a", "y": "a", "z": "b"})) == pytest.approx(1 / 3, abs=1e-12)


def test_the_interval_is_wilsons() -> None:
    """8 of 10 at z = 1.959964: centre (0.8 + z²/20) / (1 + z²/10), half width z sqrt(0.016 + z²/400) / (1 +
    z²/10)."""
    share = Share.of(8, 10)
    assert share is not None
    z2 = 1.959963984540054**2
    centre, half = (0.8 + z2 / 20) / (1 + z2 / 10), (z2 * (0.016 + z2 / 400)) ** 0.5 / (1 + z2 / 10)
    assert (share.low, share.high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert Share.of(0, 0) is None


def test_counts() -> None:
    votes = votes_of(
        {"ada": "a", "bob": "tie"}, {"ada": "skip", "bob": "b"}, {"ada": "b"}, {"ada": "a", "bob": "a"}
    )
    found = results(votes)
    assert (found.votes, found.skips) == (6, 1)
    assert found.ties == Share.of(1, 6)
    assert found.left == Share.of(3, 5)
    assert found.agreement == 0.5  # of a-tie and a-a
    ada, bob = found.raters
    assert (ada.rater, ada.votes, ada.ties, ada.skips, ada.left) == ("ada", 3, 0, 1, Share.of(2, 3))
    assert (bob.rater, bob.votes, bob.ties, bob.skips, bob.left) == ("bob", 3, 1, 0, Share.of(1, 2))


def test_no_votes() -> None:
    found = results([])
    assert (found.votes, found.skips, found.ties, found.left, found.raters) == (0, 0, None, None, [])
