"""A step's Gaussian: log density and KL against closed forms, torch and finite differences;
deterministic steps."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.diffusion.steps import Gaussian

SHAPE = (3, 2, 4, 4)


def random(seed):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_log_prob_at_the_mean():
    """The mean over elements of the log density; the joint one is D times that."""
    x = random(0)
    std = torch.tensor(0.3, dtype=torch.float64)
    expected = torch.full((3,), -math.log(0.3) - 0.5 * math.log(2 * math.pi), dtype=torch.float64)
    torch.testing.assert_close(Gaussian(mean=x, std=std).log_prob(x), expected, rtol=0, atol=1e-14)


def test_o3_the_joint_log_prob_is_the_sum_over_elements():
    """D = 32 elements: D times the mean form is torch's own sum; at the mean D (-log s - log(2 pi)
    / 2), s = .3 (1e-12)."""
    x, mean, std = random(0), random(1), torch.tensor(0.3, dtype=torch.float64)
    elements = x[0].numel()
    joint = elements * Gaussian(mean=mean, std=std).log_prob(x)
    torch.testing.assert_close(
        joint,
        torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1),
        rtol=1e-12,
        atol=0,
    )
    at_the_mean = elements * Gaussian(mean=mean, std=std).log_prob(mean)
    assert at_the_mean.tolist() == pytest.approx(
        [32 * (-math.log(0.3) - 0.5 * math.log(2 * math.pi))] * 3, rel=1e-13
    )


def test_log_prob_is_torchs():
    x, mean = random(0), random(1)
    std = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    theirs = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(Gaussian(mean=mean, std=std).log_prob(x), theirs, rtol=0, atol=1e-13)


def test_log_ratio_under_a_shift_of_the_mean():
    """log p(x; mean + d) - log p(x; mean) per element: mean -d^2 / (2 s^2), std d / (s sqrt(D)). 20
    000 draws of D = 64 elements, seed 0; margins of four standard errors."""
    n, dims, s, d = 20_000, 64, 0.3, 0.05
    mean = torch.zeros(n, dims, dtype=torch.float64)
    std = torch.tensor(s, dtype=torch.float64)
    z = torch.randn(n, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = Gaussian(mean=mean, std=std).sample(z)
    ratio = Gaussian(mean=mean + d, std=std).log_prob(x) - Gaussian(mean=mean, std=std).log_prob(x)
    spread = d / (s * math.sqrt(dims))
    assert ratio.mean().item() == pytest.approx(-(d**2) / (2 * s**2), abs=4 * spread / math.sqrt(n))
    assert ratio.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * n))


def test_log_prob_is_never_narrower_than_float32():
    x = random(0).half()
    assert Gaussian(mean=x, std=torch.tensor(0.1).half()).log_prob(x).dtype == torch.float32


def test_gradients_of_log_prob_and_kl_by_finite_differences():
    x, mean, other = (random(i)[:2, :, :1] for i in range(3))
    std, std_other = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    mean.requires_grad_(True)
    std.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m, s: Gaussian(mean=m, std=s).log_prob(x), (mean, std))
    theirs = Gaussian(mean=other, std=std_other)
    assert torch.autograd.gradcheck(lambda m, s: Gaussian(mean=m, std=s).kl(theirs), (mean, std))
    assert torch.autograd.gradcheck(lambda m, s: theirs.kl(Gaussian(mean=m, std=s)), (mean, std))


def test_kl_is_torchs():
    std, other = (
        torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1)
        for v in ([0.1, 1.0, 7.0], [0.2, 1.0, 2.0])
    )
    mine, theirs = Gaussian(mean=random(0), std=std), Gaussian(mean=random(1), std=other)
    normal = torch.distributions.Normal
    expected = (
        torch.distributions.kl_divergence(normal(mine.mean, std), normal(theirs.mean, other))
        .flatten(1)
        .mean(1)
    )
    torch.testing.assert_close(mine.kl(theirs), expected, rtol=1e-12, atol=0)
    assert mine.kl(mine).abs().max() < 1e-15


def test_a_deterministic_step_has_log_prob_zero_and_no_gradient():
    x = random(0)
    mean = random(1).requires_grad_(True)
    std = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    gaussian = Gaussian(mean=mean, std=std)
    log_prob = gaussian.log_prob(x)
    assert log_prob[0] == log_prob[2] == 0
    (grad,) = torch.autograd.grad(log_prob.sum(), mean)
    assert torch.isfinite(grad).all()
    assert (grad[[0, 2]] == 0).all()
    assert (grad[1] != 0).all()


def test_kl_of_deterministic_steps():
    """0 between equal points, infinite otherwise; never NaN, in the gradient neither."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    mean = random(0).requires_grad_(True)
    point, same, apart, wide = (
        Gaussian(mean=mean, std=zero),
        Gaussian(mean=random(0), std=zero),
        Gaussian(mean=random(1), std=zero),
        Gaussian(mean=random(1), std=one),
    )
    assert (point.kl(same) == 0).all()
    for mine, other in ((point, apart), (point, wide), (wide, point)):
        assert torch.isposinf(mine.kl(other)).all()
    mixed = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).reshape(3, 1, 1, 1)
    value = Gaussian(mean=mean, std=mixed).kl(Gaussian(mean=random(0) + 1, std=mixed))
    assert torch.isposinf(value[0])
    torch.testing.assert_close(value[1:], torch.full((2,), 2.0, dtype=torch.float64))
    (grad,) = torch.autograd.grad(value[1:].sum() + point.kl(same).sum(), mean)
    assert torch.isfinite(grad).all()
