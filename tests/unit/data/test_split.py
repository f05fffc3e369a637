"""Pairs set aside: no prompt and no picture in both parts."""

import numpy as np
import pytest

from dina_lrm.data.split import fold_prompt, held_out
from dina_lrm.errors import InvalidInputError


def test_no_prompt_and_no_picture_is_in_both_parts() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 400, 1000)
    # A picture belongs to a prompt, but every tenth pair borrows one of another prompt.
    chosen = 3 * prompts + rng.integers(0, 3, 1000)
    rejected = np.where(rng.random(1000) < 0.1, rng.integers(0, 1200, 1000), 3 * prompts + 2)
    aside = held_out(prompts, chosen, rejected, fraction=0.1, seed=1)
    assert 90 <= aside.sum() <= 100
    assert not set(prompts[aside]) & set(prompts[~aside])
    pictures = [set(np.concatenate([chosen[part], rejected[part]])) for part in (aside, ~aside)]
    assert not pictures[0] & pictures[1]


def test_the_split_follows_from_the_seed_and_the_limit_holds() -> None:
    prompts, chosen = np.arange(500), 2 * np.arange(500)
    one, again, other = (held_out(prompts, chosen, chosen + 1, fraction=0.2, seed=s) for s in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert held_out(prompts, chosen, chosen + 1, fraction=0.2, max_pairs=7).sum() == 7


def test_a_large_group_is_passed_over() -> None:
    prompts = [0] * 90 + list(range(1, 11))
    pictures = np.arange(100)
    aside = held_out(prompts, pictures, pictures + 100, fraction=0.1)
    assert not aside[:90].any()
    assert aside.sum() == 10


@pytest.mark.parametrize("prompts", [[0], [0, 0], [0, 0, 0]])
def test_one_group_cannot_be_split(prompts: list[int]) -> None:
    pictures = np.arange(len(prompts))
    with pytest.raises(InvalidInputError, match="1 group"):
        held_out(prompts, pictures, pictures + 9, fraction=0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan"), -1.0])
def test_the_fraction_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        held_out([0, 1], [0, 1], [2, 3], fraction=fraction)


def test_prompts_that_differ_in_case_and_punctuation_are_one() -> None:
    assert fold_prompt("A Cat!") == fold_prompt(" a cat")
