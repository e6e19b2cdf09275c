"""Reward backpropagation: DRaFT-K, DRaFT-LV, AlignProp and ReFL against the whole graph and finite
differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from rlalign.algorithms import reward_backprop
from rlalign.algorithms.reward_backprop import RewardBackprop
from rlalign.core.batches import PromptBatch, PromptPass
from rlalign.core.records import Plan
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import VariancePreserving
from rlalign.policies.base import Condition, Words
from tests.algorithms.helpers import FlowToy, numeric_gradient
from tests.algorithms.test_ddpo import CLOSED_FORM_K, ChainFamily, ChainPolicy
from tests.toy import MediaScorer, ToyPolicy, gradient, make_units

PLAN = Plan(steps=5, eta=1.0)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that start from float64 noise, and so are float64 throughout."""
    monkeypatch.setattr(reward_backprop, "unit_noise", lambda *call: unit_noise(*call).double())


@MediaScorer
def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """How red a picture is, curved so that second derivatives do not vanish."""
    red = media_BFCHW[:, 0, 0].mean((-1, -2)) ** 2 * 3.0
    assert len(red) == len(prompts)
    return {"red": red, "total": red}


class Watched(ToyPolicy):
    """Remembers at which denoising calls gradients were on."""

    def __init__(self, **settings: object) -> None:
        super().__init__(dtype=torch.float64)
        self.carried: list[bool] = []

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.carried.append(torch.is_grad_enabled())
        return super().denoise(x, level, condition, guidance)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """As the toy's, in the latents' own precision."""
        colour = torch.cat(
            [torch.sigmoid(latents.flatten(1)), torch.full_like(latents[:, :1, 0, 0], 0.5)], dim=1
        )
        return colour[:, None, :, None, None].expand(-1, 1, 3, 8, 8)


def passes(plan: Plan = PLAN, count: int = 1, draw: tuple[int, ...] = (1, 0)) -> list[PromptPass]:
    units = tuple(make_units(count, per_unit=4, plan=plan))
    return list(PromptBatch(units=units, scorer=scorer).passes(1, draw))


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_o15_full_backpropagation_is_the_gradient_of_the_reward() -> None:
    """last_steps 0: against finite differences of the mean reward through all five steps
    (float64)."""
    policy, (one,) = Watched(), passes()
    algorithm = RewardBackprop(last_steps=0)
    found = gradient(algorithm.loss(one, policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-3
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)
    whole = RewardBackprop(last_steps=5)
    assert torch.equal(gradient(whole.loss(one, policy).value, policy), found)


class WideChain(ChainFamily):
    """The linear chain of DDPO's oracle in float64; its picture is its last number, unsqueezed."""

    def __init__(self) -> None:
        super().__init__()
        self.network.double()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, None].expand(-1, 1, 3, 1, 1)


class Chain(ChainPolicy):
    """Its policy."""

    kind = WideChain


@MediaScorer
def last_number(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
    return {"total": media_BFCHW[:, 0, 0, 0, 0]}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("last_steps", "expected"), [(1, 1.0), (2, 1.85), (3, 2.445), (4, 3.01025), (5, 3.46245)]
)
def test_o15_draft_k_of_the_linear_chain(last_steps: int, expected: float) -> None:
    """One bias b in every step, r = x_0: dE[r]/db = sum of the last K products of a = (.9, .8, .95,
    .7, .85), by autograd.

    By finite differences too: of the biases of the last K steps, the others held (the chain is
    linear, so any step is exact). The path's a is float32: margin 2e-7.
    """
    policy, (one,) = Chain(), passes(Chain.plan)
    algorithm = RewardBackprop(last_steps=last_steps)

    def value() -> torch.Tensor:
        return -algorithm.loss(replace(one, scorer=last_number), policy).value

    found = gradient(value(), policy)
    assert found[: 5 - last_steps].tolist() == [0.0] * (5 - last_steps)
    assert found[5 - last_steps :].tolist() == pytest.approx(
        CLOSED_FORM_K[5 - last_steps :], abs=2e-7
    )
    assert found.sum().item() == pytest.approx(expected, abs=2e-7)
    bias_K = policy.network.bias_K.data
    before, step = value().item(), 0.25
    bias_K[5 - last_steps :] += step
    assert (value().item() - before) / step == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("last_steps", [1, 2, 4])
def test_o15_draft_k_differentiates_the_last_k_steps(last_steps: int) -> None:
    policy, (one,) = Watched(), passes()
    value = RewardBackprop(last_steps=last_steps).loss(one, policy).value
    assert policy.carried == [k >= 5 - last_steps for k in range(5)]
    full = RewardBackprop(last_steps=0).loss(one, policy).value
    assert value.item() == pytest.approx(full.item(), rel=1e-12), (
        "the sample is the same, only the gradient is cut"
    )
    assert not torch.allclose(gradient(value, policy), gradient(full, policy), rtol=1e-3)


def test_recomputing_changes_nothing() -> None:
    policy, (one,) = Watched(), passes()
    plain = gradient(RewardBackprop(last_steps=3).loss(one, policy).value, policy)
    again = gradient(RewardBackprop(last_steps=3, recompute=True).loss(one, policy).value, policy)
    assert torch.allclose(plain, again, rtol=1e-12, atol=1e-14)


def test_o15_low_variance_has_less_variance() -> None:
    """40 keys: the one-step gradient of 8 noised copies varies less than that of one (sum of
    variances below a half)."""
    policy = Watched()
    found: dict[int, list[torch.Tensor]] = {1: [], 8: []}
    for count, kept in found.items():
        for number in range(40):
            (one,) = passes(draw=(number, 0))
            kept.append(gradient(RewardBackprop(resamples=count).loss(one, policy).value, policy))
    variance = {count: torch.stack(kept).var(0).sum().item() for count, kept in found.items()}
    assert variance[8] < 0.5 * variance[1]
    means = {count: torch.stack(kept).mean(0) for count, kept in found.items()}
    error = (torch.stack(found[1]).var(0) / 40 + torch.stack(found[8]).var(0) / 40).sqrt()
    assert ((means[1] - means[8]).abs() <= 5 * error + 1e-12).all(), (
        "and the same mean, within 5 standard errors"
    )


class Offset(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))


class OffsetNormal(WideChain):
    """The exact denoiser of N(0, .5^2), plus an offset theta on the clean sample, in which its five
    steps end."""

    def __init__(self) -> None:
        super().__init__()
        self.path = VariancePreserving.scaled_linear(spacing="trailing", ends_clean=True)
        self.network = Offset()

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        alpha, sigma = (f(timestep_B[0].double()) for f in (self.path.alpha, self.path.sigma))
        return alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x + self.network.theta


class Normal(ChainPolicy):
    """Its policy."""

    plan = PLAN
    kind = OffsetNormal


@MediaScorer
def near_one(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """-(x_0 - 1)^2 / 2, whose slope is linear in x_0."""
    return {"total": -0.5 * (media_BFCHW[:, 0, 0, 0, 0] - 1.0) ** 2}


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_o15_low_variance_has_the_mean_of_one_step_and_less_variance() -> None:
    """DRaFT-1's dL/dtheta is x_0 - 1, DRaFT-LV's the mean of n = 8 like it, x_0' = c x_0 + d z:
    both are -1 on average.

    The chain's own recursion gives Var x_0 = v = .08226, c = .43547, d = .24791, so variances v and
    c^2 v + d^2 / 8 = .02328. 500 passes of 4 samples, seed 0: means within 4 standard errors of -1
    and of each other, variances within 25 % (4 errors).
    """
    policy = Normal()
    ways = {0.08226: RewardBackprop(last_steps=1), 0.02328: RewardBackprop(resamples=8)}
    found = {
        variance: torch.cat(
            [
                gradient(way.loss(replace(p, scorer=near_one), policy).value, policy)
                for p in passes(count=500)
            ]
        )
        for variance, way in ways.items()
    }
    for variance, slopes in found.items():
        assert slopes.mean().item() == pytest.approx(
            -1.0, abs=4 * (variance / 4 / len(slopes)) ** 0.5
        )
        assert slopes.var().item() == pytest.approx(variance / 4, rel=0.25)
    gap = found[0.08226] - found[0.02328]
    assert abs(gap.mean().item()) < 4 * (gap.var() / len(gap)).sqrt().item()
    assert found[0.02328].var() < 0.5 * found[0.08226].var(), "the closed forms are as .28 to 1"


def test_o16_alignprop_cuts_once_per_trajectory() -> None:
    """The steps with gradients are a suffix, of a length that varies with the key."""
    lengths = set()
    for number in range(30):
        policy, (one,) = Watched(), passes(draw=(number, 0))
        RewardBackprop(form="alignprop").loss(one, policy)
        assert policy.carried == sorted(policy.carried), "once on, always on"
        lengths.add(sum(policy.carried))
    assert lengths == {1, 2, 3, 4, 5}


def test_o17_refl_is_a_hinge_on_one_late_step() -> None:
    """Above the hinge exactly no gradient; below, weight times minus the reward's; one step carries
    it, in the last quarter."""
    plan = Plan(steps=8, eta=1.0)
    for number in range(10):
        policy, (one,) = Watched(), passes(plan, draw=(number, 0))
        value = RewardBackprop(form="refl", hinge=100.0, refl_weight=0.5).loss(one, policy).value
        assert sum(policy.carried) == 1
        assert policy.carried[-1]
        assert len(policy.carried) in (7, 8)
        found = gradient(value, policy)
        half = RewardBackprop(form="refl", hinge=100.0, refl_weight=0.25).loss(one, policy).value
        assert torch.allclose(found, 2 * gradient(half, policy), rtol=1e-12)
        above = RewardBackprop(form="refl", hinge=-1.0).loss(one, policy).value
        assert gradient(above, policy).abs().max() == 0.0


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("lift", [(0.0, 0.0, 0.0, 0.0), (3.0, 3.0, 3.0, 3.0), (0.0, 3.0, 0.0, 3.0)])
def test_o17_refls_defaults(lift: tuple[float, ...]) -> None:
    """hinge 2, weight 1e-3: the gradient is -1e-3 dr / dtheta averaged over samples with r < 2,
    exactly 0 where none is."""
    algorithm, (one,) = RewardBackprop(form="refl"), passes(Plan(steps=8, eta=1.0))
    assert (algorithm.hinge, algorithm.refl_weight) == (2.0, 1e-3)
    policy, rewards = Watched(), []

    @MediaScorer
    def lifted(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        rewards.append(
            media_BFCHW[:, 0, 0].double().mean((-1, -2)) ** 2
            + torch.tensor(lift, dtype=torch.float64)
        )
        return {"total": rewards[-1]}

    found = gradient(algorithm.loss(replace(one, scorer=lifted), policy).value, policy)
    algorithm.loss(replace(one, scorer=lifted), policy)
    below = rewards[-1] < 2.0
    assert below.tolist() == [value == 0.0 for value in lift]
    wanted = -1e-3 * gradient((rewards[-1] * below).mean(), policy)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    assert bool(found.abs().max() > 1e-6) is bool(below.any())
    if not below.any():
        assert found.abs().max().item() == 0.0


@pytest.mark.slow
def test_the_distance_to_the_reference_is_added() -> None:
    """DRaFT+: 0 at the reference, positive away from it, with a gradient of its own."""
    policy, (one,) = Watched(), passes()
    plain, kept = RewardBackprop(last_steps=2), RewardBackprop(last_steps=2, kl_weight=3.0)
    assert kept.loss(one, policy).means["kl/noise_mse"].item() == 0.0
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05
    with_term, without = kept.loss(one, policy), plain.loss(one, policy)
    assert with_term.value.item() == pytest.approx(
        without.value.item() + 3 * with_term.means["kl/noise_mse"].item()
    )
    found = gradient(with_term.value, policy)
    differences = numeric_gradient(lambda: kept.loss(one, policy).value, policy)
    assert not torch.allclose(found, differences, rtol=1e-3), (
        "the first steps' part of the gradient is cut off"
    )
    assert (found - gradient(without.value, policy)).abs().max() > 1e-4


def test_it_runs_on_the_flow_path_and_reports_the_reward() -> None:
    (one,) = passes(Plan(steps=5, rule="flow_ode", eta=0.0))
    loss = RewardBackprop(last_steps=2).loss(one, FlowToy())
    assert loss.means["reward/total/mean"].item() == pytest.approx(-loss.value.item())
    assert {"reward/red/mean", "reward/red/std", "reward/total/std"} <= loss.means.keys()


def test_resamples_go_with_the_last_step_alone() -> None:
    with pytest.raises(
        ValidationError, match="resamples needs form draft and last_steps 1, got draft and 3"
    ):
        RewardBackprop(resamples=2, last_steps=3)
