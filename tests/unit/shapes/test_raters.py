"""Votes follow Thurstone's law, so the Bayes-optimal accuracy is what it is said to be."""

import math

import numpy as np
import pytest

from dina_lrm.shapes.pairs import Candidate, vote
from dina_lrm.shapes.raters import RaterPanel
from dina_lrm.shapes.render import render
from dina_lrm.shapes.scenes import parse_caption, sample_scene


def test_vote_probability_is_thurstones_law_in_closed_form():
    panel = RaterPanel(num_raters=1, noise_std=0.1)
    expected = 0.5 * (1.0 + math.erf((0.9 - 0.8) / (math.sqrt(2.0) * 0.1) / math.sqrt(2.0)))
    assert panel.vote_probability(np.array(0.9), np.array(0.8)) == pytest.approx(expected, abs=1e-12)


def test_sides_are_symmetric_and_equal_utilities_are_a_coin():
    panel = RaterPanel()
    a, b = np.array([0.2, 0.9, 0.5]), np.array([0.4, 0.3, 0.5])
    np.testing.assert_allclose(
        panel.majority_probability(a, b) + panel.majority_probability(b, a), 1.0, atol=1e-12
    )
    assert panel.majority_probability(a, b)[2] == pytest.approx(0.5)


def test_majority_of_three_in_closed_form():
    panel = RaterPanel(num_raters=3, noise_std=0.1)
    p = panel.vote_probability(np.array(0.9), np.array(0.8))
    assert panel.majority_probability(np.array(0.9), np.array(0.8)) == pytest.approx(
        p**3 + 3 * p**2 * (1 - p)
    )


def test_the_stated_bayes_accuracy_is_reached_by_knowing_the_utilities():
    rng, panel = np.random.default_rng(0), RaterPanel()
    a, b = rng.uniform(0.4, 1.0, 40_000), rng.uniform(0.4, 1.0, 40_000)
    majority_for_a = 2 * panel.votes_for_a(a, b, rng) > panel.num_raters
    stated = panel.majority_probability(a, b)
    assert np.mean(majority_for_a == (a > b)) == pytest.approx(
        np.maximum(stated, 1 - stated).mean(), abs=0.006
    )


@pytest.mark.parametrize(
    "bad", [{"num_raters": 4}, {"num_raters": 0}, {"noise_std": 0.0}, {"noise_std": float("nan")}]
)
def test_a_panel_without_a_majority_or_without_noise_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RaterPanel(**bad)


def test_all_pairs_of_a_caption_are_voted_on_and_chosen_has_the_majority():
    rng = np.random.default_rng(1)
    captions = ["a red circle on a gray background", "a blue cross on a white background"]
    candidates = [
        Candidate(
            caption=caption,
            image=render(sample_scene(rng, parse_caption(caption))),
            origin=str(i),
            utility=i / 3,
        )
        for caption in captions
        for i in range(4)
    ]
    voted = vote(candidates, RaterPanel(), rng)
    assert len(voted.pairs) == 2 * 6
    assert all(pair.votes_chosen > pair.votes_rejected for pair in voted.pairs)
    assert all(pair.votes_chosen + pair.votes_rejected == 5 for pair in voted.pairs)
    clear = [
        probability for pair, probability in zip(voted.pairs, voted.bayes, strict=True) if pair.target == 1.0
    ]
    assert np.mean(clear) > 0.9
