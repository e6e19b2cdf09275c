"""Step rules number for number against diffusers, and against closed forms on data whose denoiser
is known exactly."""

from __future__ import annotations

import diffusers
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import RectifiedFlow, VariancePreserving, coefficients
from rlalign.diffusion.predictions import to_clean_and_noise
from rlalign.diffusion.rollout import rollout
from rlalign.diffusion.steps import RULES, Move, ddim, ddpm, flow_ode, flow_sde, is_stochastic, step

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
SHAPE = (3, 2, 4, 4)


def random(seed):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_float64(scheduler):
    """diffusers computes a step in its table's type: from here on, float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    else:
        scheduler.one = scheduler.one.double()
    return scheduler


def ours(x, prediction, path, levels, k, *, rule, eta, kind):
    alpha, sigma = coefficients(path, levels[k], x)
    clean, noise = to_clean_and_noise(prediction, x, alpha, sigma, kind)
    return step(x, clean, noise, path, levels[k], levels[k + 1], rule=rule, eta=eta)


# against diffusers


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers(spacing, to_one, kind, eta):
    """Every step of a 10-step chain in float64, margin 1e-12. (10 divides 1000: elsewhere
    diffusers' DDIM steps to t - 1000 // steps, which is not the next timestep of its own grid.)"""
    theirs = in_float64(
        diffusers.DDIMScheduler(
            **SD,
            set_alpha_to_one=to_one,
            prediction_type=kind,
            timestep_spacing=spacing,
            steps_offset=1,
        )
    )
    theirs.set_timesteps(10)
    path = VariancePreserving.scaled_linear(spacing=spacing, offset=1, ends_clean=to_one)
    levels = path.levels(10)
    x = random(0)
    for k, t in enumerate(theirs.timesteps):
        prediction, z = random(100 + k), random(200 + k)
        gaussian = ours(x, prediction, path, levels, k, rule="ddim", eta=eta, kind=kind)
        variance = theirs._get_variance(t, t - 100)
        torch.testing.assert_close(gaussian.std, eta * variance.sqrt(), rtol=0, atol=1e-12)
        x = theirs.step(prediction, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(gaussian.sample(z), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "offset"), [(10, 0), (7, 0), (7, 1)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_is_diffusers(spacing, kind, steps, offset, variance_type):
    """DDPM steps to the next timestep of its grid, so 7 steps agree too. Its last step is always to
    the clean sample: with a small variance it adds noise there whose variance is clamped to 1e-20,
    hence the margin of 1e-9 on that one step; with a large one it adds beta's, but for timestep 0,
    where a leading grid without an offset ends."""
    told = {"timestep_spacing": spacing, "steps_offset": offset, "variance_type": variance_type}
    theirs = in_float64(diffusers.DDPMScheduler(**SD, **told, prediction_type=kind))
    theirs.set_timesteps(steps)
    path = VariancePreserving.scaled_linear(
        spacing=spacing, offset=offset, ends_clean=True, variance_type=variance_type
    )
    levels = path.levels(steps)
    x = random(0)
    for k, t in enumerate(theirs.timesteps):
        prediction = random(100 + k)
        gaussian = ours(x, prediction, path, levels, k, rule="ddpm", eta=1.0, kind=kind)
        z = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        x = theirs.step(prediction, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
        torch.testing.assert_close(
            gaussian.sample(z), x, rtol=0, atol=1e-12 if k < steps - 1 else 1e-9
        )
        if k < steps - 1:
            variance = theirs._get_variance(t)  # of the small logarithm the exponential of its half
            std = variance if variance_type == "fixed_small_log" else variance.sqrt()
            torch.testing.assert_close(gaussian.std, std, rtol=0, atol=1e-12)
    assert (gaussian.std > 0) == (variance_type == "fixed_large" and t > 0)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "fixed_large_log"])
def test_ddpm_refuses_a_variance_that_it_has_not(variance_type):
    """Learned ones are the network's; of fixed_large_log diffusers' step takes the root of a
    logarithm, which is no number."""
    path = VariancePreserving.scaled_linear(variance_type=variance_type)
    with pytest.raises(
        UserError, match=rf"plan\.rule ddpm needs .* got '{variance_type}'; take the rule ddim"
    ):
        is_stochastic(path, path.levels(4), rule="ddpm", eta=1.0)
    assert is_stochastic(path, path.levels(4), rule="ddim", eta=1.0).any()  # which has its own


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("rule", ["flow_ode", "ddim"])
def test_the_flow_ode_is_diffusers(shift, rule):
    """diffusers steps in float32: margin 2e-6 on numbers of size 1, on its own float32 grid."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(10)
    path, levels = RectifiedFlow(shift=shift), theirs.sigmas.double()
    x = random(0).float()
    for k, t in enumerate(theirs.timesteps):
        velocity = random(100 + k).float()
        gaussian = ours(x, velocity, path, levels, k, rule=rule, eta=0.0, kind="flow")
        assert gaussian.std == 0
        x = theirs.step(velocity, t, x).prev_sample
        torch.testing.assert_close(gaussian.mean, x, rtol=0, atol=2e-6)


# one formula, several names


@pytest.mark.parametrize(
    "path", [VariancePreserving.scaled_linear(ends_clean=True), RectifiedFlow(shift=3.0)]
)
def test_ddim_with_eta_one_is_the_ddpm_posterior(path):
    levels, clean, noise = path.levels(8), random(1), random(2)
    for k in range(8):
        alpha, sigma = coefficients(path, levels[k], clean)
        x = alpha * clean + sigma * noise
        one = ddim(Move(x, clean, noise, path, levels[k], levels[k + 1], 1.0))
        two = ddpm(Move(x, clean, noise, path, levels[k], levels[k + 1], 1.0))
        torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.std, two.std, rtol=0, atol=1e-14)


def test_ddim_without_noise_is_eulers_step_on_the_flow_path():
    path = RectifiedFlow(shift=3.0)
    levels, clean, noise = path.levels(8), random(1), random(2)
    for k in range(8):
        x = (1 - levels[k]) * clean + levels[k] * noise
        one = ddim(Move(x, clean, noise, path, levels[k], levels[k + 1], 0.0))
        two = flow_ode(Move(x, clean, noise, path, levels[k], levels[k + 1], 0.0))
        torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-14)
        assert one.std == two.std == 0


def test_the_flow_sde_without_noise_is_the_ode():
    path = RectifiedFlow()
    levels, x, clean, noise = path.levels(8), random(0), random(1), random(2)
    for k in range(8):
        sde = flow_sde(Move(x, clean, noise, path, levels[k], levels[k + 1], 0.0))
        ode = flow_ode(Move(x, clean, noise, path, levels[k], levels[k + 1], 0.0))
        torch.testing.assert_close(sde.mean, ode.mean, rtol=0, atol=1e-14)
        assert sde.std == 0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_level_per_sample_is_the_same_step(rule):
    path = RectifiedFlow() if rule.startswith("flow") else VariancePreserving.scaled_linear()
    levels, x, clean, noise = path.levels(3), random(0), random(1), random(2)
    together = step(x, clean, noise, path, levels[:3], levels[1:], rule=rule, eta=0.8)
    assert together.std.shape == (3, 1, 1, 1)
    for b in range(3):
        row = slice(b, b + 1)
        alone = step(
            x[row], clean[row], noise[row], path, levels[b], levels[b + 1], rule=rule, eta=0.8
        )
        assert torch.equal(alone.mean, together.mean[row])
        assert torch.equal(alone.std, together.std[b, 0, 0, 0])


# data N(0.7, 0.5^2): the exact denoiser is affine, so mean and variance go through a chain in
# closed form


def propagate(path, levels, *, rule, eta, mean=0.7, std=0.5, start=None):
    """Mean and std at the end of a chain under the exact denoiser; ``start`` is N(0, 1) when not
    given."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    m, variance = start or (zero, one)

    def gaussian(x, k):
        alpha, sigma = coefficients(path, levels[k], x)
        gap = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return step(
            x,
            mean + alpha * std**2 * gap,
            sigma * gap,
            path,
            levels[k],
            levels[k + 1],
            rule=rule,
            eta=eta,
        )

    for k in range(len(levels) - 1):
        found = gaussian(torch.cat([zero, one]), k)
        at_zero, at_one = found.mean[:1], found.mean[1:]
        slope = at_one - at_zero
        m, variance = (
            slope * m + at_zero,
            slope**2 * variance + found.std.expand_as(found.mean)[:1] ** 2,
        )
    return m.item(), variance.sqrt().item()


@pytest.mark.parametrize(("eta", "mean", "std"), [(0.0, 0.67424, 0.47857), (1.0, 0.69868, 0.45358)])
def test_mean_and_std_through_stable_diffusions_chain(eta, mean, std):
    """O1: 50 leading steps of Stable Diffusion's schedule: values made independently, five
    digits."""
    path = VariancePreserving.scaled_linear()
    found = propagate(path, path.levels(50), rule="ddim", eta=eta)
    assert found == pytest.approx((mean, std), abs=6e-6)


@pytest.mark.parametrize("eta", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_a_chain_returns_the_data_as_its_grid_gets_finer(eta):
    """Started from the noised data: the mean is exact on any grid, the std falls short by O(1 /
    steps)."""
    path = VariancePreserving.scaled_linear(ends_clean=True, spacing="trailing")
    first = path.levels(1)[0]
    alpha, sigma = path.alpha(first).reshape(1, 1), path.sigma(first).reshape(1, 1)
    start = (0.7 * alpha, (0.5 * alpha) ** 2 + sigma**2)
    ends = [propagate(path, path.levels(n), rule="ddim", eta=eta, start=start) for n in (100, 1000)]
    assert [m for m, _ in ends] == pytest.approx([0.7, 0.7], abs=1e-12)
    coarse, fine = (0.5 - s for _, s in ends)
    assert 0 < fine < 0.005
    assert coarse > 5 * fine


@pytest.mark.parametrize(
    ("rule", "eta", "std", "table"),
    [
        ("flow_ode", 0.0, 0.5, (0.3697, 0.4647, 0.4964, 0.4996)),
        ("flow_sde", 0.7, 0.5, (0.4244, 0.4793, 0.4986, 0.5001)),
        pytest.param(
            "flow_dance", 0.3, 0.5, (0.3852, 0.4686, 0.4968, 0.4997), marks=pytest.mark.slow
        ),
        ("flow_cps", 0.8, 0.5, (0.3146, 0.3711, 0.3977, 0.4031)),
        pytest.param("flow_ode", 0.0, 0.0, (0.0, 0.0, 0.0, 0.0), marks=pytest.mark.slow),
        pytest.param("flow_sde", 0.7, 0.0, (0.228, 0.057, 0.006, 0.0006), marks=pytest.mark.slow),
        pytest.param("flow_cps", 0.8, 0.0, (0.0, 0.0, 0.0, 0.0), marks=pytest.mark.slow),
    ],
)
def test_o2_final_std_of_the_flow_chains(rule, eta, std, table):
    """O2: shift 3, 10, 40, 400, 4000 steps: values made independently, to their printed digits.
    Flow-GRPO's SDE leaves noise in data that is one point; but for CPS all give back data with a
    spread as the grid gets finer."""
    path = RectifiedFlow(shift=3.0)
    digits = 5.1e-5 if std else 5.1e-4
    for n, expected in zip((10, 40, 400, 4000), table, strict=True):
        levels = path.shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        found = propagate(path, levels, rule=rule, eta=eta, std=std)
        assert found == pytest.approx((0.7, expected), abs=digits)


@pytest.mark.slow
def test_o2_dances_sde_blows_up_on_fine_grids_for_a_point():
    """O2, data that is one point: std .1575, .0994, .2214, 306.9, 2.6e14 at 10, 40, 400, 4000, 40
    000 steps.

    Values made independently. Near the data the score's correction eta^2 |dt| / (2 s^2) passes 2,
    and the step overshoots.
    """
    path = RectifiedFlow(shift=3.0)
    for n, expected in (
        (10, 0.157467),
        (40, 0.099409),
        (400, 0.221431),
        (4000, 306.902374),
        (40_000, 2.631380e14),
    ):
        levels = path.shifted(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        _, found = propagate(path, levels, rule="flow_dance", eta=0.3, std=0.0)
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_flow_sde_is_the_published_code():
    """Flow-GRPO's sd3_sde_with_logprob, written out: g's denominator alone takes the next grid
    value at level 1."""
    path = RectifiedFlow(shift=3.0)
    levels, x, velocity = path.levels(6), random(0), random(1)
    for k in range(6):
        s, gap = levels[k], levels[k + 1] - levels[k]
        g = 0.7 * torch.sqrt(s / (1 - (levels[1] if s == 1 else s)))
        mean = x * (1 + g**2 / (2 * s) * gap) + velocity * (1 + g**2 * (1 - s) / (2 * s)) * gap
        found = ours(x, velocity, path, levels, k, rule="flow_sde", eta=0.7, kind="flow")
        torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.std, g * torch.sqrt(-gap), rtol=0, atol=1e-14)


def test_kl_with_equal_std_is_the_squared_gap():
    """KL = |gap|^2 / (2 s^2), here per element; Flow-GRPO's coded number is that times |level_next
    - level| (its g has no time step in it)."""
    path = RectifiedFlow(shift=3.0)
    levels, x, one, two = path.levels(10), random(0), random(1), random(2)
    for k in (0, 4, 9):
        mine = ours(x, one, path, levels, k, rule="flow_sde", eta=0.7, kind="flow")
        theirs = ours(x, two, path, levels, k, rule="flow_sde", eta=0.7, kind="flow")
        gap2 = ((mine.mean - theirs.mean) ** 2).flatten(1).mean(1)
        found = mine.kl(theirs)
        torch.testing.assert_close(found, gap2 / (2 * mine.std**2), rtol=1e-12, atol=0)
        time = levels[k] - levels[k + 1]
        g2 = mine.std**2 / time
        torch.testing.assert_close(found * time, gap2 / (2 * g2), rtol=1e-12, atol=0)


# which steps have a density


@pytest.mark.parametrize(
    ("path", "rule", "eta", "expected"),
    [
        (VariancePreserving.scaled_linear(ends_clean=True), "ddim", 1.0, [True, True, True, False]),
        (VariancePreserving.scaled_linear(ends_clean=False), "ddim", 1.0, [True] * 4),
        (
            VariancePreserving.scaled_linear(ends_clean=False, offset=0),
            "ddim",
            1.0,
            [True, True, True, False],
        ),
        (VariancePreserving.scaled_linear(ends_clean=True), "ddpm", 1.0, [True, True, True, False]),
        (VariancePreserving.scaled_linear(ends_clean=False), "ddim", 0.0, [False] * 4),
        (RectifiedFlow(), "ddim", 1.0, [True, True, True, False]),
        (RectifiedFlow(), "flow_ode", 1.0, [False] * 4),
        (RectifiedFlow(), "flow_sde", 0.7, [True] * 4),
    ],
)
def test_which_steps_have_a_density(path, rule, eta, expected):
    assert is_stochastic(path, path.levels(4), rule=rule, eta=eta).tolist() == expected


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_nothing_is_nan_on_any_grid(rule, steps):
    """Values and gradients, in float32, at the ends of the path too; zero terminal SNR (alpha 0)
    included."""
    zero_snr = VariancePreserving(
        torch.cat([torch.linspace(0.999, 0.01, 999), torch.zeros(1)]), spacing="trailing"
    )
    stable = [VariancePreserving.scaled_linear(ends_clean=clean) for clean in (True, False)]
    for path in (
        [RectifiedFlow(shift=3.0)]
        if rule.startswith("flow")
        else [zero_snr, *stable, RectifiedFlow()]
    ):
        levels = path.levels(steps)
        for k in range(steps):
            clean, noise = (
                random(1).float().requires_grad_(True),
                random(2).float().requires_grad_(True),
            )
            gaussian = step(
                random(0).float(), clean, noise, path, levels[k], levels[k + 1], rule=rule, eta=1.0
            )
            log_prob = gaussian.log_prob(gaussian.sample(random(3).float()).detach())
            assert torch.isfinite(log_prob).all()
            assert torch.isfinite(gaussian.mean).all()
            for grad in torch.autograd.grad(log_prob.sum(), (clean, noise), allow_unused=True):
                assert grad is None or torch.isfinite(grad).all()


# the least std


@pytest.mark.parametrize("min_std", [0.05, 0.3])
def test_a_floor_widens_narrow_steps_alone_and_leaves_means(min_std):
    """DPPO's clip, written out: also in the last step, which has no noise of its own."""
    path = VariancePreserving.scaled_linear(ends_clean=True)
    levels = path.levels(5)
    x, clean, noise = random(1), random(2), random(3)
    how = {"rule": "ddim", "eta": 1.0}
    wider = 0
    for k in range(5):
        plain = step(x, clean, noise, path, levels[k], levels[k + 1], **how)
        found = step(x, clean, noise, path, levels[k], levels[k + 1], **how, min_std=min_std)
        assert torch.equal(found.mean, plain.mean)
        assert found.std.item() == max(plain.std.item(), min_std)
        wider += found.std.item() > plain.std.item()
    assert wider >= 1
    assert is_stochastic(path, levels, **how).tolist() == [True] * 4 + [False]
    assert is_stochastic(path, levels, **how, min_std=min_std).all()
    ode = step(x, clean, noise, path, levels[0], levels[1], rule="ddim", eta=0.0, min_std=min_std)
    assert ode.std.item() == 0.0, "a step without noise, as outside of a window"


def test_stored_log_probs_are_those_of_the_floor_at_the_end():
    """A window of the last two steps: nothing before them has a density, and each has that of
    N(mean, max(std, floor)), averaged over elements."""
    from tests.toy import ToyPolicy

    plan = Plan(steps=5, eta=1.0, window=2, window_place="end", min_std=0.4)
    unit = Unit.of_rows(UnitKey("train", 1, 0), [(7, "a red circle", i) for i in range(3)], 0, plan)
    policy = ToyPolicy()
    trajectory, _ = rollout(policy, unit, 0)
    assert trajectory.stochastic_K.tolist() == [False] * 3 + [True] * 2
    assert trajectory.kept == (3, 4, 5)
    levels = policy.path.levels(5)
    for k in (3, 4):
        before, after = (torch.from_numpy(trajectory.latents_BK1[:, k - 3 + i]) for i in (0, 1))
        with torch.no_grad():
            clean, noise = policy.denoise(before, levels[k], policy.encode(unit.prompts), 1.0)
        plain = step(
            before, clean, noise, policy.path, levels[k], levels[k + 1], rule="ddim", eta=1.0
        )
        std = max(plain.std.item(), 0.4)
        wanted = torch.distributions.Normal(plain.mean, std).log_prob(after).flatten(1).mean(1)
        torch.testing.assert_close(torch.from_numpy(trajectory.log_prob_BK[:, k]), wanted)
