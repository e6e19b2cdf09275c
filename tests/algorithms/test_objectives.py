"""Objectives against closed forms (exact to float64 rounding unless a test says otherwise)."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.algorithms import _objectives as objectives
from rlalign.diffusion.steps import Gaussian

CLIP = 1e-4


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (1.0, 1.0 - 2e-4, -0.9998),
        (1.0, 1.0, -1.0),
        (1.0, 1.0 + 2e-4, 0.0),
        (-1.0, 1.0 - 2e-4, 0.0),
        (-1.0, 1.0, 1.0),
        (-1.0, 1.0 + 2e-4, 1.0002),
    ],
)
def test_clip_gradient_table(advantage: float, ratio: float, slope: float) -> None:
    """d loss / d log ratio at c = 1e-4: zero only where the ratio has already left in the
    advantage's own direction."""
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss = objectives.clipped_surrogate(
        torch.exp(log_ratio), torch.tensor(advantage, dtype=torch.float64), CLIP
    )
    loss.backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(slope, abs=1e-12)


def test_importance_sampling_equals_score_function_at_ratio_one() -> None:
    """Before the first update the surrogate's gradient is REINFORCE's, exactly, float32 and
    float64."""
    for dtype in (torch.float32, torch.float64):
        log_prob = torch.randn(64, dtype=dtype, requires_grad=True)
        advantage = torch.randn(64, dtype=dtype)
        ratio = objectives.ratio(log_prob, log_prob.detach())
        assert torch.equal(ratio, torch.ones_like(ratio))
        (clipped,) = torch.autograd.grad(
            objectives.clipped_surrogate(ratio, advantage, CLIP).mean(), log_prob
        )
        (plain,) = torch.autograd.grad(
            objectives.score_function(log_prob, advantage).mean(), log_prob
        )
        assert torch.equal(clipped, plain)
        assert torch.equal(plain, -advantage / 64)


def test_surrogate_is_the_pessimistic_one() -> None:
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 2.0], dtype=torch.float64)
    up = objectives.clipped_surrogate(ratio, torch.ones(5, dtype=torch.float64), 0.2)
    down = objectives.clipped_surrogate(ratio, -torch.ones(5, dtype=torch.float64), 0.2)
    assert up.tolist() == pytest.approx([-0.5, -0.9, -1.0, -1.1, -1.2], abs=1e-15)
    assert down.tolist() == pytest.approx([0.8, 0.9, 1.0, 1.1, 2.0], abs=1e-15)


def test_clip_fraction_counts_what_left_the_range() -> None:
    ratio = torch.tensor([0.79, 0.81, 1.0, 1.19, 1.21])
    assert objectives.clip_fraction(ratio, 0.2).item() == pytest.approx(0.4)


def test_gaussian_kl_is_the_closed_form() -> None:
    """|difference|^2 / (2 std^2) over elements, times their count the joint KL; equal to
    Gaussian.kl at one std."""
    mean, other = (
        torch.randn(3, 2, 4, 4, dtype=torch.float64),
        torch.randn(3, 2, 4, 4, dtype=torch.float64),
    )
    std = torch.tensor([0.3, 0.7, 1.5], dtype=torch.float64).reshape(3, 1, 1, 1)
    joint = objectives.gaussian_kl(mean, other, std) * 32
    expected = [((mean[i] - other[i]) ** 2).sum() / (2 * std[i].item() ** 2) for i in range(3)]
    assert torch.allclose(joint, torch.stack(expected), rtol=1e-12)
    assert torch.allclose(
        joint / 32, Gaussian(mean=mean, std=std).kl(Gaussian(mean=other, std=std)), rtol=1e-12
    )


def test_preference_loss_is_ln_2_at_a_tie_and_swapping_flips_the_gradient() -> None:
    """dL/d(winner - loser) = -beta / 2 at a tie; exact."""
    winner = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loser = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = objectives.preference_loss(objectives.preference_logit(winner, loser, 5000.0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    loss.backward()
    assert winner.grad is not None
    assert loser.grad is not None
    assert winner.grad.item() == pytest.approx(-2500.0)
    assert loser.grad.item() == pytest.approx(2500.0)


def test_preference_loss_is_the_negative_log_likelihood() -> None:
    logit = torch.tensor([-40.0, -1.0, 0.3, 40.0], dtype=torch.float64)
    expected = torch.log1p(torch.exp(-logit))
    assert torch.allclose(objectives.preference_loss(logit), expected, rtol=1e-12, atol=1e-17)


def test_reward_weights_have_mean_one_and_ignore_a_shift() -> None:
    reward = torch.randn(50, dtype=torch.float64)
    weight = objectives.reward_weights(reward, 0.7)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(weight, objectives.reward_weights(reward + 100.0, 0.7), rtol=1e-10)
    assert torch.allclose(
        weight[0] / weight[1], torch.exp((reward[0] - reward[1]) / 0.7), rtol=1e-10
    )


def test_reward_weights_move_a_gaussian_by_the_closed_form() -> None:
    """Weighted maximum likelihood of N(0.5, 0.9^2) with reward 2 x at temperature 1.5 has its mean
    at m + s^2 a / T = 1.58.

    Statistical: 400 000 draws, seed 0; the standard error is about 0.003, the margin 0.012.
    """
    x = 0.5 + 0.9 * torch.randn(
        400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    weight = objectives.reward_weights(2.0 * x, 1.5)
    assert (weight * x).mean().item() == pytest.approx(1.58, abs=0.012)
