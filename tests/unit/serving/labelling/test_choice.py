"""The order in which pairs are shown."""

import numpy as np

from dina_lrm.serving.labelling.choice import next_pairs, rater_order


def order(num_pairs: int = 5, **changed) -> list[int]:
    given = {
        "seen": np.zeros(num_pairs, bool),
        "votes": np.zeros(num_pairs, np.int64),
        "shown": np.zeros(num_pairs, np.int64),
        "wanted": 2,
        "probability": None,
        "chance": np.arange(num_pairs) / num_pairs,
    }
    arrays = {name: np.array(value) if isinstance(value, list) else value for name, value in changed.items()}
    return next_pairs(**(given | arrays)).tolist()


def test_chance_decides_among_equals() -> None:
    assert order(chance=[0.4, 0.1, 0.9, 0.0, 0.5]) == [3, 1, 0, 4, 2]


def test_what_was_seen_or_has_enough_votes_is_not_shown() -> None:
    assert order(seen=[True, False, False, False, True], votes=[0, 2, 0, 3, 0]) == [2]


def test_the_most_uncertain_first_on_either_side() -> None:
    assert order(probability=[0.9, 0.45, 0.2, 0.52, 0.6]) == [3, 1, 4, 2, 0]


def test_unknown_pairs_stand_behind_known_ones() -> None:
    assert order(probability=[np.nan, 1.0, np.nan, 0.5, 0.0]) == [3, 1, 4, 0, 2]


def test_need_comes_before_uncertainty() -> None:
    assert order(votes=[1, 0, 0, 1, 0], probability=[0.5, 0.9, 0.8, 0.5, 0.7]) == [4, 2, 1, 0, 3]


def test_what_others_look_at_now_waits_but_is_not_lost() -> None:
    assert order(num_pairs=3, votes=[1, 1, 1], shown=[1, 0, 0]) == [1, 2, 0]


def test_chance_is_a_function_of_seed_and_rater() -> None:
    first = rater_order(0, "ada", 200)
    for again in (rater_order(0, "ada", 200), rater_order(0, "Ada", 200)):
        assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    for seed, rater in ((1, "ada"), (0, "bob")):
        other = rater_order(seed, rater, 200)
        assert not np.array_equal(first[0], other[0])
        assert 60 <= int((first[1] != other[1]).sum()) <= 140  # independent coins: outside once in 10^8


def test_sides_are_fair() -> None:
    left = np.mean([rater_order(0, str(rater), 500)[1].mean() for rater in range(40)])
    assert abs(left - 0.5) < 0.0142  # four standard errors of 20,000 coins
