"""Noise ensembling: token order, score averages, standard errors."""

import math

import pytest
import torch

from dina_lrm.core.ensemble import (
    average_levels,
    concatenate_levels,
    mean_and_standard_error,
    unfold_levels,
)


@pytest.fixture
def levels() -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0)))


def test_concatenation_is_along_tokens(levels):
    tokens = concatenate_levels(levels)
    assert tokens.shape == (2, 15, 4)
    for k, level in enumerate(levels):
        assert torch.equal(tokens[:, 5 * k : 5 * (k + 1)], level)


def test_one_batched_call_gives_the_same_sequence(levels):
    assert torch.equal(unfold_levels(torch.cat(levels), num_levels=3), concatenate_levels(levels))


def test_one_level_is_itself(levels):
    assert torch.equal(concatenate_levels(levels[:1]), levels[0])
    assert torch.equal(unfold_levels(levels[0], num_levels=1), levels[0])


def test_attention_over_all_tokens_is_not_the_mean_over_levels(levels):
    """Weights of a joint softmax: a level with larger logits takes more than its third."""
    query = torch.ones(4)
    joint = concatenate_levels(levels)
    joint_out = (joint @ query).softmax(dim=1).unsqueeze(1) @ joint
    separate = torch.stack([(x @ query).softmax(dim=1).unsqueeze(1) @ x for x in levels])
    assert not torch.allclose(joint_out, separate.mean(dim=0), atol=1e-2)
    # It is the mean weighted by each level's share of the partition function.
    share = torch.stack([(x @ query).logsumexp(dim=1) for x in levels]).softmax(dim=0)
    torch.testing.assert_close(joint_out, (share[:, :, None, None] * separate).sum(dim=0))


def test_the_order_of_levels_does_not_reach_an_attention(levels):
    forward, backward = (concatenate_levels(x) for x in (levels, levels[::-1]))
    query = torch.ones(4)
    a, b = ((x @ query).softmax(dim=1).unsqueeze(1) @ x for x in (forward, backward))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_levels", [0, 4])
def test_rows_must_divide_into_levels(levels, num_levels):
    with pytest.raises(ValueError, match=f"6 rows .*{num_levels}"):
        unfold_levels(torch.cat(levels), num_levels=num_levels)


def test_empty_ensemble():
    with pytest.raises(ValueError, match="at least one noise level"):
        concatenate_levels([])


def test_average_of_bfloat16_scores_is_float32():
    scores = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.bfloat16)
    assert average_levels(scores).dtype == torch.float32
    assert average_levels(scores).tolist() == [1.5, 3.0]


def test_standard_error_by_hand():
    """1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, error sqrt(14/12)."""
    mean, error = mean_and_standard_error(torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    assert mean.item() == 3
    assert error is not None
    assert error.item() == pytest.approx(math.sqrt(14 / 12))


def test_standard_error_covers_the_truth():
    """Mean of 16 unit normal draws: within 1.96 standard errors in 93 of 100 cases (Student's t, 15)."""
    draws = torch.randn(16, 4000, generator=torch.Generator().manual_seed(0))
    mean, error = mean_and_standard_error(draws)
    assert error is not None
    assert (mean.abs() <= 1.96 * error).float().mean().item() == pytest.approx(0.931, abs=0.012)


def test_one_draw_has_no_spread():
    mean, error = mean_and_standard_error(torch.tensor([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert error is None
