"""Guidance on a Gaussian: the exact noisy gradient comes to the posterior, the reward of the mean
to its known bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import step
from rlalign.samplers.classifier_guidance import ClassifierGuidance
from rlalign.samplers.training_free import TrainingFree
from tests.samplers.helpers import (
    ExactRewards,
    GaussianPolicy,
    engine_of,
    linear_path,
    quadratic,
    unit_of,
)

A, B2 = 2.0, 0.25
"""The classifier says N(a, b2) of a clean sample: the posterior of N(0, 1) is N(1.6, 0.2)."""


def exact(
    x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """log p(y | x_t) where x_0 | x_t is N(alpha x_t, sigma^2), up to a constant."""
    alpha, sigma = alpha.reshape(-1), sigma.reshape(-1)
    return -((alpha * x.flatten(1)[:, 0] - A) ** 2) / (2.0 * (B2 + sigma**2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "eta", "steps", "mean", "variance"),
    [("mean", 1.0, 50, 1.394, 0.256), ("score", 0.0, 50, 1.595, 0.176)],
)
def test_the_exact_noisy_gradient_comes_to_the_known_moments(
    form: str, eta: float, steps: int, mean: float, variance: float
) -> None:
    """Seed 0, 1,000 samples: four standard errors are 0.065 of the mean and 0.045 of the
    variance."""
    method = ClassifierGuidance(form=form, classifier="tests.samplers.test_guidance:exact")
    engine = engine_of(GaussianPolicy(linear_path()), quadratic(A, B2))
    found = method.sample(engine, unit_of(1000, Plan(steps=steps, eta=eta)))
    assert float(found.latents.mean()) == pytest.approx(mean, abs=0.065)
    assert float(found.latents.var()) == pytest.approx(variance, abs=0.045)
    assert engine.cost.denoiser_calls == 1000 * method.looks(Plan(steps=steps))
    assert engine.cost.gradient_calls == 1000 * steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "eta", "mean", "variance"), [("mean", 1.0, 1.96, 0.125), ("score", 0.0, 2.55, 0.018)]
)
def test_the_reward_of_the_clean_sample_seen_is_biased_by_the_known_amount(
    form: str, eta: float, mean: float, variance: float
) -> None:
    """The bias is the method's: whoever removes it has built another one.

    100 steps, 400 samples, seed 0: the limit to within 0.1."""
    method = ClassifierGuidance(form=form, of="reward")
    engine = engine_of(GaussianPolicy(linear_path()), quadratic(A, B2))
    found = method.sample(engine, unit_of(400, Plan(steps=100, eta=eta)))
    assert float(found.latents.mean()) == pytest.approx(mean, abs=0.1)
    assert float(found.latents.var()) == pytest.approx(variance, abs=0.045)


@pytest.mark.slow
def test_guidance_on_the_flow_path_comes_to_the_same_posterior() -> None:
    """x_t = (1 - s) x_0 + s e: x_0 | x_t is Gaussian too. Seed 0; the Euler grid's own bias is
    below 0.05 at 200 steps."""
    from rlalign.diffusion.paths import RectifiedFlow

    method = ClassifierGuidance(classifier="tests.samplers.test_guidance:exact_flow")
    engine = engine_of(GaussianPolicy(RectifiedFlow()), quadratic(A, B2))
    found = method.sample(engine, unit_of(800, Plan(steps=200, rule="flow_ode")))
    assert float(found.latents.mean()) == pytest.approx(1.6, abs=0.1)
    assert float(found.latents.var()) == pytest.approx(0.2, abs=0.06)


def exact_flow(
    x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    alpha, sigma = alpha.reshape(-1), sigma.reshape(-1)
    spread = alpha**2 + sigma**2
    return -((alpha * x.flatten(1)[:, 0] / spread - A) ** 2) / (2.0 * (B2 + sigma**2 / spread))


# --- training-free guidance: the special cases are the published methods -------------------------


def _reward(x_BD: torch.Tensor) -> torch.Tensor:
    return torch.sin(x_BD).sum(1) - 0.3 * (x_BD**2).sum(1)


def _grad(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), at)[0]


@pytest.mark.parametrize("case", ["dps", "mpgd"])
def test_one_size_alone_is_the_published_method(case: str) -> None:
    """To 1e-12 in float64, on DDIM with noise: DPS moves by the gradient through the denoiser, MPGD
    the clean sample."""
    policy, plan, count = _GaussianPair(), Plan(steps=6, eta=1.0), 3
    unit = unit_of(count, plan)
    sizes = {"rho": 0.3, "mu": 0.0} if case == "dps" else {"rho": 0.0, "mu": 0.3}
    method = TrainingFree(**sizes, rho_course="constant", mu_course="constant")
    found = method.sample(engine_of(policy, ExactRewards(_reward)), unit).latents

    schedule, path = schedule_of(policy.path, unit), policy.path
    x = unit_noise(unit, 0, (2, 1, 1)).double()
    for k in range(plan.steps):
        now, then = schedule.levels[k], schedule.levels[k + 1]
        wanted = x.clone().requires_grad_()
        clean, noise = policy.denoise(wanted, now, policy.encode(unit.prompts), 1.0)
        gaussian = step(wanted, clean, noise, path, now, then, rule="ddim", eta=1.0)
        mean = gaussian.mean.detach()
        if case == "dps":
            mean = mean + float(path.alpha(then) / path.alpha(now)) * 0.3 * _grad(
                _reward(clean.flatten(1)), wanted
            )
        else:
            c = clean.detach().requires_grad_()
            mean = mean + float(path.alpha(then)) * 0.3 * _grad(_reward(c.flatten(1)), c)
        noisy = float(gaussian.std) > 0
        x = mean + (gaussian.std * unit_noise(unit, k + 1, (2, 1, 1)).double() if noisy else 0.0)
    torch.testing.assert_close(found, x.detach(), atol=1e-12, rtol=0)


class _GaussianPair(GaussianPolicy):
    """Two numbers, correlated through nothing but the reward."""

    def __init__(self) -> None:
        super().__init__(linear_path(), size=2, mean=0.4, variance=0.6)


def test_noisy_copies_average_the_likelihood_and_recurrence_repeats_the_step() -> None:
    plan = Plan(steps=5, eta=1.0)
    engine = engine_of(_GaussianPair(), ExactRewards(_reward))
    one = TrainingFree(
        rho=0.2, mu=0.1, draws=4, spread=0.2, iterations=2, recurrence=3, largest=1.0
    )
    found = one.sample(engine, unit_of(2, plan))
    assert torch.isfinite(found.latents).all()
    assert engine.cost.denoiser_calls == 2 * one.looks(plan) == 2 * 15
    assert engine.cost.gradient_calls == 2 * 15 * 4 * (1 + 2)


def test_the_gradient_of_the_average_is_that_of_log_mean_exp() -> None:
    """Against finite differences of log mean exp over the very copies that the method draws."""
    from rlalign.samplers.training_free import _Move, _noise

    policy, unit = _GaussianPair(), unit_of(1, Plan(steps=5, eta=1.0))
    settings = TrainingFree(draws=5, spread=0.5)
    work = _Move(
        unit=unit,
        x=torch.zeros(1, 2, 1, 1).double(),
        k=1,
        turn=0,
        rho=1.0,
        mu=0.0,
        settings=settings,
    )
    sigma = float(policy.path.sigma(schedule_of(policy.path, unit).levels[1]))
    noises = torch.cat([_noise(unit, ("copy", 1, 0, d), work.x) for d in range(5)])

    def value(point: torch.Tensor) -> float:
        return float(
            torch.logsumexp(_reward((point + 0.5 * sigma * noises).flatten(1)), 0) - np.log(5.0)
        )

    clean = torch.tensor([0.3, -0.8]).double().reshape(1, 2, 1, 1).requires_grad_()
    total_B, gradient = work._pull(policy, ExactRewards(_reward), clean, clean)
    assert float(total_B[0]) == pytest.approx(value(clean.detach()), abs=1e-12)
    for i in range(2):
        nudge = torch.zeros(1, 2, 1, 1).double()
        nudge[0, i] = 1e-6
        numeric = (value(clean.detach() + nudge) - value(clean.detach() - nudge)) / 2e-6
        assert float(gradient[0, i]) == pytest.approx(numeric, abs=1e-8)
