"""Every prediction type means the same (clean, noise), and comes back from its own training
target."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from rlalign.diffusion.paths import RectifiedFlow, VariancePreserving, coefficients
from rlalign.diffusion.predictions import PredictionType, target, to_clean_and_noise

VP, FLOW = VariancePreserving.scaled_linear(), RectifiedFlow()
CASES = [(path, kind) for path in (VP, FLOW) for kind in ("epsilon", "sample")] + [
    (VP, "v_prediction"),
    (FLOW, "flow"),
]


def pair():
    torch.manual_seed(3)
    return torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randn(
        5, 2, 3, 3, dtype=torch.float64
    )


def test_the_cases_cover_every_prediction_type():
    assert {kind for _, kind in CASES} == set(get_args(PredictionType))


@pytest.mark.parametrize(("path", "kind"), CASES)
def test_a_perfect_network_gives_back_clean_and_noise(path, kind):
    clean, noise = pair()
    level = path.levels(7)[1:6]  # alpha and sigma both positive
    alpha, sigma = coefficients(path, level, clean)
    x = alpha * clean + sigma * noise
    found = to_clean_and_noise(target(clean, noise, alpha, sigma, kind), x, alpha, sigma, kind)
    torch.testing.assert_close(found[0], clean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("path", "kind"), CASES)
def test_whatever_the_network_says_clean_and_noise_recombine_to_x(path, kind):
    x, prediction = pair()
    alpha, sigma = coefficients(path, path.levels(7)[3], x)
    clean, noise = to_clean_and_noise(prediction, x, alpha, sigma, kind)
    torch.testing.assert_close(alpha * clean + sigma * noise, x, rtol=0, atol=1e-12)


def test_pure_noise_is_fine_for_velocities():
    """At alpha = 0 (flow at level 1, or zero terminal SNR) an epsilon network says nothing of the
    clean sample; these do."""
    clean, noise = pair()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for kind in ("v_prediction", "flow", "sample"):
        found = to_clean_and_noise(target(clean, noise, zero, one, kind), noise, zero, one, kind)
        torch.testing.assert_close(found, (clean, noise), rtol=0, atol=1e-15)


def test_the_velocity_target_is_diffusers():
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    clean, noise = pair()
    level = torch.tensor([0.0, 10.0, 400.0, 800.0, 999.0], dtype=torch.float64)
    alpha, sigma = coefficients(VP, level, clean)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    theirs = scheduler.get_velocity(clean, noise, level.long())
    torch.testing.assert_close(
        target(clean, noise, alpha, sigma, "v_prediction"), theirs, rtol=0, atol=1e-12
    )


def test_an_unknown_prediction_is_none_of_the_known_ones() -> None:
    one = torch.ones(1)
    with pytest.raises(AssertionError, match="must be one of .*'flow'.*, got 'flow_prediction'"):
        to_clean_and_noise(one, one, one, one, "flow_prediction")  # type: ignore[arg-type]
