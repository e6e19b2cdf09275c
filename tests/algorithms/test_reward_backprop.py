"""Reward backpropagation: DRaFT-K, DRaFT-LV, AlignProp and ReFL against the whole graph and finite differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from pydantic import ValidationError

from rlalign.algorithms.reward_backprop import RewardBackprop
from rlalign.batches import PromptBatch, PromptPass
from rlalign.policies.base import Condition
from rlalign.records import Plan
from tests.algorithms.helpers import FlowToy, numeric_gradient
from tests.toy import ToyPolicy, gradient, make_units

PLAN = Plan(steps=5, eta=1.0)


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
        colour = torch.cat([torch.sigmoid(latents.flatten(1)), torch.full_like(latents[:, :1, 0, 0], 0.5)], dim=1)
        return colour[:, None, :, None, None].expand(-1, 1, 3, 8, 8)


def passes(plan: Plan = PLAN, count: int = 1, draw: tuple[int, ...] = (1, 0)) -> list[PromptPass]:
    return list(PromptBatch(units=tuple(make_units(count, per_unit=4, plan=plan))).passes(1, draw))


def test_o15_full_backpropagation_is_the_gradient_of_the_reward() -> None:
    """last_steps 0: against finite differences of the mean reward through all five steps (float64)."""
    policy, (one,) = Watched(), passes()
    algorithm = RewardBackprop(last_steps=0)
    found = gradient(algorithm.loss(one, policy, scorer).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy, scorer).value, policy)
    assert differences.abs().max() > 1e-3
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)
    whole = RewardBackprop(last_steps=5)
    assert torch.equal(gradient(whole.loss(one, policy, scorer).value, policy), found)


@pytest.mark.parametrize("last_steps", [1, 2, 4])
def test_o15_draft_k_differentiates_the_last_k_steps(last_steps: int) -> None:
    policy, (one,) = Watched(), passes()
    value = RewardBackprop(last_steps=last_steps).loss(one, policy, scorer).value
    assert policy.carried == [k >= 5 - last_steps for k in range(5)]
    full = RewardBackprop(last_steps=0).loss(one, policy, scorer).value
    assert value.item() == pytest.approx(full.item(), rel=1e-12), "the sample is the same, only the gradient is cut"
    assert not torch.allclose(gradient(value, policy), gradient(full, policy), rtol=1e-3)


def test_recomputing_changes_nothing() -> None:
    policy, (one,) = Watched(), passes()
    plain = gradient(RewardBackprop(last_steps=3).loss(one, policy, scorer).value, policy)
    again = gradient(RewardBackprop(last_steps=3, recompute=True).loss(one, policy, scorer).value, policy)
    assert torch.allclose(plain, again, rtol=1e-12, atol=1e-14)


def test_o15_low_variance_has_less_variance() -> None:
    """40 keys: the one-step gradient of 8 noised copies varies less than that of one (sum of variances below a half)."""
    policy = Watched()
    found: dict[int, list[torch.Tensor]] = {1: [], 8: []}
    for count, kept in found.items():
        for number in range(40):
            (one,) = passes(draw=(number, 0))
            kept.append(gradient(RewardBackprop(resamples=count).loss(one, policy, scorer).value, policy))
    variance = {count: torch.stack(kept).var(0).sum().item() for count, kept in found.items()}
    assert variance[8] < 0.5 * variance[1]
    means = {count: torch.stack(kept).mean(0) for count, kept in found.items()}
    error = (torch.stack(found[1]).var(0) / 40 + torch.stack(found[8]).var(0) / 40).sqrt()
    assert ((means[1] - means[8]).abs() <= 5 * error + 1e-12).all(), "and the same mean, within 5 standard errors"


def test_o16_alignprop_cuts_once_per_trajectory() -> None:
    """The steps with gradients are a suffix, of a length that varies with the key."""
    lengths = set()
    for number in range(30):
        policy, (one,) = Watched(), passes(draw=(number, 0))
        RewardBackprop(form="alignprop").loss(one, policy, scorer)
        assert policy.carried == sorted(policy.carried), "once on, always on"
        lengths.add(sum(policy.carried))
    assert lengths == {1, 2, 3, 4, 5}


def test_o17_refl_is_a_hinge_on_one_late_step() -> None:
    """Above the hinge exactly no gradient; below, weight times minus the reward's; one step carries it, in the last quarter."""
    plan = Plan(steps=8, eta=1.0)
    for number in range(10):
        policy, (one,) = Watched(), passes(plan, draw=(number, 0))
        value = RewardBackprop(form="refl", hinge=100.0, refl_weight=0.5).loss(one, policy, scorer).value
        assert sum(policy.carried) == 1
        assert policy.carried[-1]
        assert len(policy.carried) in (7, 8)
        found = gradient(value, policy)
        half = RewardBackprop(form="refl", hinge=100.0, refl_weight=0.25).loss(one, policy, scorer).value
        assert torch.allclose(found, 2 * gradient(half, policy), rtol=1e-12)
        above = RewardBackprop(form="refl", hinge=-1.0).loss(one, policy, scorer).value
        assert gradient(above, policy).abs().max() == 0.0


def test_the_distance_to_the_reference_is_added() -> None:
    """DRaFT+: 0 at the reference, positive away from it, with a gradient of its own."""
    policy, (one,) = Watched(), passes()
    plain, kept = RewardBackprop(last_steps=2), RewardBackprop(last_steps=2, kl_weight=3.0)
    assert kept.loss(one, policy, scorer).means["kl/noise_mse"].item() == 0.0
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05
    with_term, without = kept.loss(one, policy, scorer), plain.loss(one, policy, scorer)
    assert with_term.value.item() == pytest.approx(without.value.item() + 3 * with_term.means["kl/noise_mse"].item())
    found = gradient(with_term.value, policy)
    differences = numeric_gradient(lambda: kept.loss(one, policy, scorer).value, policy)
    assert not torch.allclose(found, differences, rtol=1e-3), "the first steps' part of the gradient is cut off"
    assert (found - gradient(without.value, policy)).abs().max() > 1e-4


def test_it_runs_on_the_flow_path_and_reports_the_reward() -> None:
    (one,) = passes(Plan(steps=5, rule="flow_ode", eta=0.0))
    loss = RewardBackprop(last_steps=2).loss(one, FlowToy(), scorer)
    assert loss.means["reward/total/mean"].item() == pytest.approx(-loss.value.item())
    assert {"reward/red/mean", "reward/red/std", "reward/total/std"} <= loss.means.keys()


def test_resamples_go_with_the_last_step_alone() -> None:
    with pytest.raises(ValidationError, match="resamples needs form draft and last_steps 1, got draft and 3"):
        RewardBackprop(resamples=2, last_steps=3)
