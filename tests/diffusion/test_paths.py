"""Paths and their grids against diffusers' own schedulers, and against the identities that define
them."""

from __future__ import annotations

import diffusers
import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.diffusion.paths import RectifiedFlow, VariancePreserving, coefficients

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHIFTS = (0.3, 1.0, 1.15, 3.0, 7.3)


def scheduler(**settings):
    return diffusers.DDIMScheduler(**SD, clip_sample=False, **settings)


def test_the_schedule_is_stable_diffusions_bit_for_bit():
    assert torch.equal(
        VariancePreserving.scaled_linear().alphas_cumprod, scheduler().alphas_cumprod.double()
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 333, 999])
def test_the_grid_is_diffusers(spacing, steps):
    theirs = scheduler(timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(steps)
    path = VariancePreserving.scaled_linear(spacing=spacing, offset=1)
    levels = path.levels(steps)
    assert levels.dtype == torch.float64
    assert torch.equal(path.timestep(levels[:-1]), theirs.timesteps)
    assert levels[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("ends_clean", [True, False])
def test_every_grid_is_as_long_as_asked_and_falls(spacing, ends_clean):
    """For 61, 103, ... steps of 1000 np.arange alone gives one value too many: diffusers 0.42 then
    ends at timestep -1."""
    path = VariancePreserving.scaled_linear(spacing=spacing, offset=0, ends_clean=ends_clean)
    for steps in [*range(1, 130), 201, 999, 1000]:
        levels = path.levels(steps)
        assert len(levels) == steps + 1
        assert 0 <= levels[-2] <= levels[0] < 1000
        # ends_clean False may stay at timestep 0: a step that does nothing, and is deterministic
        assert (levels.diff()[:-1] < 0).all() and levels.diff()[-1] <= 0


def test_an_offset_past_the_end_stays_on_the_schedule():
    assert VariancePreserving.scaled_linear(spacing="leading", offset=1).levels(1000)[0] == 999


def test_more_steps_than_timesteps_is_the_users_mistake():
    path = VariancePreserving.scaled_linear(train_steps=100)
    with pytest.raises(UserError, match=r"plan\.steps must be <= 100, .*got 101"):
        path.levels(101)


def test_the_last_level_is_clean_or_timestep_zero():
    table = scheduler().alphas_cumprod.double()
    clean = VariancePreserving(table, ends_clean=True)
    assert clean.levels(10)[-1] == -1
    assert clean.alpha(clean.levels(10)[-1]) == 1
    assert clean.sigma(clean.levels(10)[-1]) == 0
    noisy = VariancePreserving(table, ends_clean=False)
    assert noisy.levels(10)[-1] == 0
    assert noisy.alpha(noisy.levels(10)[-1]) == table[0].sqrt()
    assert noisy.sigma(noisy.levels(10)[-1]) == (1 - table[0]).sqrt()


def test_variance_is_preserved_and_noise_grows():
    path = VariancePreserving.scaled_linear()
    level = torch.arange(-1, 1000, dtype=torch.float64)
    alpha, sigma = path.alpha(level), path.sigma(level)
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-15
    assert (sigma.diff() > 0).all()
    assert torch.equal(alpha[1:], path.alphas_cumprod.sqrt())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50])
def test_the_flow_grid_is_diffusers(shift, steps):
    """diffusers keeps sigmas in float32, and its lowest one is made in float32: margin 2e-7
    (sigma), 2e-4 (timestep)."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    path = RectifiedFlow(shift=shift)
    levels = path.levels(steps)
    assert levels.dtype == torch.float64
    torch.testing.assert_close(levels, theirs.sigmas.double(), rtol=0, atol=2e-7)
    torch.testing.assert_close(
        path.timestep(levels[:-1]), theirs.timesteps.double(), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_flow_grid_starts_at_exactly_one_and_falls_to_zero(shift):
    levels = RectifiedFlow(shift=shift).levels(25)
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_shift_is_a_bijection_of_the_unit_interval(shift):
    level = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = RectifiedFlow(shift=shift).shifted(level)
    torch.testing.assert_close(moved, shift * level / (1 + (shift - 1) * level), rtol=0, atol=1e-15)
    torch.testing.assert_close(
        RectifiedFlow(shift=1 / shift).shifted(moved), level, rtol=0, atol=1e-14
    )


def test_the_flow_path_mixes_linearly():
    path, level = RectifiedFlow(), torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(path.alpha(level) + path.sigma(level), torch.ones(11, dtype=torch.float64))
    assert path.alpha(level)[0] == 1
    assert path.sigma(level)[-1] == 1


@pytest.mark.parametrize("path", [VariancePreserving.scaled_linear(), RectifiedFlow()])
def test_coefficients_take_the_latents_shape_and_type(path):
    levels = path.levels(4)
    x = torch.zeros(3, 4, 8, 8)
    alpha, sigma = coefficients(path, levels[1], x)
    assert alpha.shape == sigma.shape == ()
    assert alpha.dtype == torch.float32
    alpha_B, sigma_B = coefficients(path, levels[1:4], x)
    assert alpha_B.shape == sigma_B.shape == (3, 1, 1, 1)
    assert alpha_B[0].item() == alpha.item()
    assert sigma_B[0].item() == sigma.item()
