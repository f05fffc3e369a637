"""Losses of alignment: values by hand, gradients in float64 against derivatives written out."""

import math

import pytest
import torch
from torch import Tensor

from dina_lrm.core.preference import (
    clipped_policy_loss,
    diffusion_dpo_loss,
    group_advantages,
    normalised_log_ratio,
    step_dpo_loss,
)


def numbers(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_advantages_by_hand() -> None:
    # means 2 and 10; deviations 1 and 4; over the batch: sqrt((1 + 1 + 16 + 16) / 4) = sqrt(8.5)
    rewards = torch.tensor([[1.0, 3.0], [6.0, 14.0]], dtype=torch.float64)
    own = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(own, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64))
    together = group_advantages(rewards, over="batch", eps=0.0)
    expected = torch.tensor([[-1.0, 1.0], [-4.0, 4.0]], dtype=torch.float64) / math.sqrt(8.5)
    torch.testing.assert_close(together, expected)


def test_a_flat_group_gets_zeros_and_not_nan() -> None:
    for eps in (0.0, 1e-4):
        assert group_advantages(torch.full((1, 4), 7.0), eps=eps).tolist() == [[0.0] * 4]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples per prompt"):
        group_advantages(torch.ones(3, 1))


def test_clipped_loss_and_its_gradient() -> None:
    """Inside the range -A w with gradient -A w; outside it is clipped where that makes the loss larger:
    a good sample (A > 0) above 1 + c and a bad one below 1 - c get no gradient; the other two keep theirs."""
    ratio = numbers(1.05, 1.5, 1.5, 0.5, 0.5)
    advantage = numbers(2.0, 2.0, -2.0, 2.0, -2.0)
    log_ratio = ratio.log().requires_grad_()
    loss, clipped = clipped_policy_loss(log_ratio, advantage, clip_range=0.1)
    assert loss.tolist() == pytest.approx([-2.1, -2.2, 3.0, -1.0, 1.8])
    assert clipped.tolist() == [False, True, False, False, True]
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx([-2.1, 0.0, 3.0, -1.0, 0.0])


def test_normalised_ratio_is_the_drawn_noise_times_the_change() -> None:
    """With x = m_old + s e: log w = mean(e d / s - d^2 / (2 s^2)), so what is left is mean(e d)."""
    generator = torch.Generator().manual_seed(0)
    noise, old, change = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    std = numbers(0.2, 0.9)
    wide = std.reshape(-1, 1, 1, 1)
    log_ratio = (noise * change / wide - change.square() / (2 * wide.square())).flatten(1).mean(dim=1)
    found = normalised_log_ratio(log_ratio, old + change, old, std)
    torch.testing.assert_close(found, (noise * change).flatten(1).mean(dim=1))


def test_diffusion_dpo_gradient() -> None:
    """x = -beta/2 ((a - a') - (b - b')), loss = -log sigmoid(x): d/da = (1 - sigmoid(x)) beta/2, d/db the
    negative."""
    beta = 3.0
    a, b = numbers(0.5, 0.2, grad=True), numbers(0.4, 0.7, grad=True)
    reference_a, reference_b = numbers(0.6, 0.1), numbers(0.3, 0.5)
    loss = diffusion_dpo_loss(a, b, reference_a, reference_b, beta=beta)
    x = -0.5 * beta * ((a - reference_a) - (b - reference_b)).detach()
    torch.testing.assert_close(loss.detach(), torch.log1p((-x).exp()))
    loss.sum().backward()
    expected = (1 - torch.sigmoid(x)) * beta / 2
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, expected)
    torch.testing.assert_close(b.grad, -expected)


def test_step_dpo_gradient() -> None:
    """x = beta ((a - a') - (b - b')): d/da = -beta (1 - sigmoid(x)), d/db the negative."""
    beta = 4.0
    a, b = numbers(-0.5, 0.2, grad=True), numbers(0.4, -0.7, grad=True)
    reference_a, reference_b = numbers(-0.6, 0.1), numbers(0.3, -0.5)
    loss = step_dpo_loss(a, b, reference_a, reference_b, beta=beta)
    x = beta * ((a - reference_a) - (b - reference_b)).detach()
    loss.sum().backward()
    expected = -beta * (1 - torch.sigmoid(x))
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, expected)
    torch.testing.assert_close(b.grad, -expected)
