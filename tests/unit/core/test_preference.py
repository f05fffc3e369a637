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
    reward_groups,
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


@pytest.mark.parametrize("over", ["group", "batch"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_equal_rewards_have_no_advantage_whatever_their_size(over: str, eps: float) -> None:
    """The mean of 24 float32 values of 1000.1 is not 1000.1; what is left was once -0.38 for every sample."""
    for value in (0.0, 1e-30, 0.1, -7.3, 1000.1, 1e5 + 0.3, 3e8, 1e30):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for count in (2, 3, 24):
                rewards = torch.full((2, count), value, dtype=dtype)
                assert not group_advantages(rewards, over=over, eps=eps).any()
                assert reward_groups(rewards).flat.all()


@pytest.mark.parametrize("over", ["group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_below_the_resolution_have_none_either(over: str, dtype: torch.dtype) -> None:
    """Neighbouring numbers of the rewards' own dtype, at any size of them: rounding, and no preference."""
    for value in (1.0, 7.3, 1000.1, 30_000.3):
        near = torch.full((3, 24), value, dtype=dtype)
        up = torch.nextafter(near[:, :1], torch.full_like(near[:, :1], torch.inf))
        near[0, ::2], near[1, :1], near[2, :8] = up[0], up[1], up[2]
        assert near.unique().numel() == 2
        assert group_advantages(near, over=over, eps=0.0).abs().max() == 0.0
        assert reward_groups(near).flat.all()


def test_the_advantage_rises_smoothly_from_the_resolution() -> None:
    """std = k eps |r|: none up to k = 1, then 1 - 1/k^2 of the whole; at k = 100 nothing is missing."""
    largest, step = 1024.0, 1024.0 * torch.finfo(torch.float32).eps
    shares = []
    for k in (0.5, 1.0, 1.5, 2.0, 4.0, 100.0):
        rewards = torch.tensor([[largest, largest - 2 * k * step]], dtype=torch.float32)
        shares.append(float(group_advantages(rewards, eps=0.0)[0, 0]))
    assert shares == pytest.approx([0.0, 0.0, 1 - 1 / 2.25, 1 - 1 / 4, 1 - 1 / 16, 1 - 1e-4], abs=1e-3)


def test_ordinary_groups_keep_their_values() -> None:
    """Against the formula without the factor, at scores as rewards give them."""
    rewards = 5 + 0.3 * torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    centred = rewards.double() - rewards.double().mean(dim=1, keepdim=True)
    plain = centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), plain.float(), rtol=1e-5, atol=1e-5)
    together = centred / (centred.square().mean().sqrt() + 1e-4)
    torch.testing.assert_close(
        group_advantages(rewards, over="batch"), together.float(), rtol=1e-5, atol=1e-5
    )
    # In bfloat16 the resolution at 5 is 0.04: 2 % of the variance may be rounding.
    coarse = group_advantages(rewards.bfloat16())
    torch.testing.assert_close(coarse, plain.float(), rtol=0.05, atol=0.1)


def test_a_flat_group_beside_others_stays_flat_over_the_batch() -> None:
    near = torch.full((4,), 1e5)
    near[::2] = torch.nextafter(near[::2], torch.tensor(torch.inf))
    rewards = torch.stack([near, torch.tensor([1.0, 3.0, 1.0, 3.0])])
    advantages = group_advantages(rewards, over="batch", eps=0.0)
    assert not advantages[0].any()
    assert advantages[1].abs().min() > 1


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


@pytest.mark.parametrize("targets", [(1.0, 1.0), (0.75, 0.2), (0.5, 0.0)])
def test_diffusion_dpo_gradient(targets: tuple[float, float]) -> None:
    """x = -beta/2 ((a - a') - (b - b')), loss = -y log sigmoid(x) - (1 - y) log sigmoid(-x):
    d/da = (y - sigmoid(x)) beta/2, d/db the negative."""
    beta = 3.0
    a, b = numbers(0.5, 0.2, grad=True), numbers(0.4, 0.7, grad=True)
    reference_a, reference_b = numbers(0.6, 0.1), numbers(0.3, 0.5)
    y = numbers(*targets)
    loss = diffusion_dpo_loss(a, b, reference_a, reference_b, y, beta=beta)
    x = -0.5 * beta * ((a - reference_a) - (b - reference_b)).detach()
    torch.testing.assert_close(loss.detach(), y * torch.log1p((-x).exp()) + (1 - y) * torch.log1p(x.exp()))
    loss.sum().backward()
    expected = (y - torch.sigmoid(x)) * beta / 2
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, expected)
    torch.testing.assert_close(b.grad, -expected)


def test_a_tie_is_lowest_at_the_reference_and_knows_no_sides() -> None:
    e, tie = numbers(0.3), numbers(0.5)
    moved = numbers(0.3, grad=True)
    diffusion_dpo_loss(moved, e, e, e, tie, beta=5.0).sum().backward()
    assert moved.grad is not None
    assert moved.grad.abs().item() < 1e-12
    for other in (0.1, 0.7):
        a, b = numbers(other), numbers(0.3)
        there, back = (diffusion_dpo_loss(*sides, e, e, tie, beta=5.0) for sides in ((a, b), (b, a)))
        torch.testing.assert_close(there, back)
        assert there.item() > math.log(2)


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
