"""Diffusion-DPO and D3PO: ln 2 at the reference, beta / 4, what is shared between winner and loser,
what is clipped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import best_and_worst
from rlalign.algorithms.d3po import D3PO
from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.core.batches import PairPass, Pairs
from rlalign.core.records import Plan
from rlalign.diffusion.paths import VariancePreserving, elbo_weight
from rlalign.policies.base import Condition
from tests.algorithms.helpers import FlowToy, in_float64, numeric_gradient, scored_of
from tests.algorithms.test_dpok import moved
from tests.toy import PROMPTS, ToyPolicy, gradient

PLAN = Plan(steps=4, eta=1.0)


class Watched(ToyPolicy):
    """Remembers what ``error`` was asked."""

    def error(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        self.asked = (clean, noise, level, condition)
        return super().error(clean, noise, level, condition)


def pairs(label: float = 1.0, dtype: torch.dtype = torch.float64) -> Pairs:
    first = torch.tensor(
        [[[[0.5]], [[-0.2]]], [[[1.1]], [[0.3]]], [[[-0.4]], [[0.9]]]], dtype=dtype
    )
    return Pairs(
        prompts=PROMPTS[:3],
        first=first,
        second=first.flip(0) * 0.5 - 0.3,
        label_B=torch.full((3,), label, dtype=dtype),
        key=(7,),
        plan=PLAN,
    )


def pass_of(pairs: Pairs) -> PairPass:
    return PairPass(pairs=pairs, label_B=pairs.label_B, key=("draw", 7), weight=1.0)


def a_pass(label: float = 1.0, dtype: torch.dtype = torch.float64) -> PairPass:
    return pass_of(pairs(label, dtype))


@pytest.mark.parametrize("make", [ToyPolicy, FlowToy])
@pytest.mark.parametrize("label", [1.0, 0.0, 0.5])
def test_o9_at_the_reference_the_loss_is_ln_2(make: type[ToyPolicy], label: float) -> None:
    loss = DiffusionDPO().loss(a_pass(label), make(dtype=torch.float64))
    assert loss.value.item() == pytest.approx(math.log(2.0), abs=1e-12)


def test_o9_the_slope_at_the_reference_is_beta_over_4() -> None:
    """dL / d(d_w - d_l) = beta / 4 with s = beta / 2: 1250 at beta 5000."""
    gap = torch.zeros((), dtype=torch.float64, requires_grad=True)
    objectives.labelled_preference_loss(-(5000.0 / 2) * gap, torch.ones(())).backward()
    assert gap.grad is not None
    assert gap.grad.item() == pytest.approx(1250.0)


class Told(ToyPolicy):
    """Its errors are what a test says: those of the policy where a gradient is wanted, those of the
    reference otherwise."""

    mine: torch.Tensor
    theirs: torch.Tensor

    def error(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        self.level_B = level[: len(level) // 2]
        return self.mine if torch.is_grad_enabled() else self.theirs


def told(mine: list[float], theirs: list[float]) -> tuple[Told, PairPass]:
    """A policy with these errors of winners, then losers; and a pass of as many pairs."""
    policy = Told(dtype=torch.float64)
    policy.mine = torch.tensor(mine, dtype=torch.float64, requires_grad=True)
    policy.theirs = torch.tensor(theirs, dtype=torch.float64)
    one, count = pairs(), len(mine) // 2
    cut = {name: getattr(one, name)[:count] for name in ("prompts", "first", "second", "label_B")}
    return policy, pass_of(replace(one, **cut))


def test_o9_the_classes_own_slope_at_beta_5000_is_1250() -> None:
    """One pair at the reference: dL/dd_w = beta / 4 = 1250 and dL/dd_l = -1250, so 1250 along d_w -
    d_l (1e-9)."""
    policy, one = told([0.31, 0.47], [0.31, 0.47])
    algorithm = DiffusionDPO()
    assert (algorithm.beta, algorithm.weighting) == (5000.0, "uniform")
    loss = algorithm.loss(one, policy).value
    assert loss.item() == pytest.approx(math.log(2.0), abs=1e-12)
    (slope,) = torch.autograd.grad(loss, policy.mine)
    assert slope.tolist() == pytest.approx([1250.0, -1250.0], rel=1e-12)


@pytest.mark.parametrize("beta", [0.5, 8.0])
def test_the_classes_own_scale(beta: float) -> None:
    """Away from the reference: -log sigmoid(-s (d_w - d_l)), s = beta / 2, or beta T w(t) with Ho's
    weight for epsilon."""
    mine, theirs = [0.30, 0.52, 0.40, 0.61], [0.35, 0.50, 0.38, 0.66]
    policy, one = told(mine, theirs)
    d = policy.mine.detach() - policy.theirs
    gap = d[:2] - d[2:]
    uniform = DiffusionDPO(beta=beta).loss(one, policy).value
    assert uniform.item() == pytest.approx(
        torch.log1p(torch.exp(beta / 2 * gap)).mean().item(), rel=1e-12
    )
    elbo = DiffusionDPO(beta=beta, weighting="elbo").loss(one, policy).value
    bar, t = policy.path.alphas_cumprod, policy.level_B.long()
    assert (t > 0).all()
    step, before = 1 - bar[t] / bar[t - 1], bar[t - 1]
    variance = step * (1 - before) / (1 - bar[t])
    weight = step**2 / (2 * variance * (1 - step) * (1 - bar[t]))
    assert elbo.item() == pytest.approx(
        torch.log1p(torch.exp(beta * 1000 * weight * gap)).mean().item(), rel=1e-9
    )


@pytest.mark.parametrize("make", [ToyPolicy, FlowToy])
def test_o9_a_picture_against_itself_is_ln_2_and_pulls_nowhere(make: type[ToyPolicy]) -> None:
    """w = l, away from the reference: same level, same noise, so d_w = d_l whatever the policy
    is."""
    policy = moved(make(dtype=torch.float64), 0.1)
    one = pass_of(replace(pairs(), second=pairs().first))
    loss = DiffusionDPO().loss(one, policy).value
    assert loss.item() == pytest.approx(math.log(2.0), abs=1e-12)
    other = gradient(DiffusionDPO().loss(a_pass(), policy).value, policy).abs().max()
    assert gradient(loss, policy).abs().max() < 1e-12 * other


def test_o9_the_gaussian_toy() -> None:
    """Policies N(theta, 1) against N(0, 1): dL/dtheta = -beta (x_w - x_l) sigmoid(-beta theta (x_w
    - x_l)) = -.524527."""
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    winner, loser = 1.3, -0.4
    ratios = [-((x - theta) ** 2) / 2 + x**2 / 2 for x in (winner, loser)]
    objectives.preference_loss(objectives.preference_logit(*ratios, 0.7)).backward()
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-0.524527, abs=1e-6)


def test_winner_and_loser_share_level_noise_and_caption() -> None:
    policy = Watched(dtype=torch.float64)
    one = a_pass()
    DiffusionDPO(caption_dropout=0.5).loss(one, policy)
    clean, noise, level, condition = policy.asked
    assert torch.equal(clean, torch.cat([one.pairs.first, one.pairs.second]))
    for shared in (noise, level, condition.caption["embeds_BLD"]):
        assert torch.equal(*shared.chunk(2))


def test_the_same_key_draws_the_same_and_another_another() -> None:
    policy = moved(ToyPolicy(dtype=torch.float64))
    algorithm = DiffusionDPO()
    value = algorithm.loss(a_pass(), policy).value
    assert torch.equal(algorithm.loss(a_pass(), policy).value, value)
    assert not torch.equal(algorithm.loss(replace(a_pass(), key=("draw", 8)), policy).value, value)


def test_swapping_the_sides_flips_the_gradient_at_the_reference() -> None:
    policy = ToyPolicy(dtype=torch.float64)
    found = [
        gradient(DiffusionDPO(beta=50.0).loss(a_pass(label), policy).value, policy)
        for label in (1.0, 0.0, 0.5)
    ]
    assert found[0].abs().max() > 1e-3
    assert torch.allclose(found[0], -found[1], rtol=0, atol=1e-12)
    assert found[2].abs().max() < 1e-12, "a tie pulls neither way"


@pytest.mark.parametrize("weighting", ["uniform", "elbo"])
@pytest.mark.parametrize("make", [ToyPolicy, FlowToy])
def test_the_gradient_is_that_of_finite_differences(make: type[ToyPolicy], weighting: str) -> None:
    policy = moved(make(dtype=torch.float64), 0.02)
    algorithm = DiffusionDPO(beta=5.0 if weighting == "uniform" else 0.05, weighting=weighting)
    found = gradient(algorithm.loss(a_pass(), policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(a_pass(), policy).value, policy)
    assert differences.abs().max() > 1e-6
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


def test_the_elbo_weight_is_the_papers() -> None:
    """Ho 2020, eq. 12 for epsilon: beta^2 / (2 std^2 alpha (1 - alpha_bar)), std^2 the posterior's
    variance, at every level."""
    path = VariancePreserving.scaled_linear()
    bar = path.alphas_cumprod
    t = torch.tensor([1, 7, 400, 999])
    alpha, before = bar[t] / bar[t - 1], bar[t - 1]
    beta = 1 - alpha
    variance = beta * (1 - before) / (1 - bar[t])
    wanted = beta**2 / (2 * variance * alpha * (1 - bar[t]))
    assert torch.allclose(elbo_weight(path, t.double(), "epsilon"), wanted, rtol=1e-9)


def test_media_are_encoded_by_the_policy() -> None:
    """uint8 pictures and the latents that the policy's encoder makes of them give the same loss."""
    policy = moved(ToyPolicy())
    one = pairs(dtype=torch.float32)
    shown = {
        s: (policy.decode(getattr(one, s)) * 255).round().to(torch.uint8)
        for s in ("first", "second")
    }
    latents = {s: policy.encode_media(m.float() / 255) for s, m in shown.items()}
    assert torch.equal(
        DiffusionDPO().loss(pass_of(replace(one, **shown)), policy).value,
        DiffusionDPO().loss(pass_of(replace(one, **latents)), policy).value,
    )


def test_best_against_worst_of_each_prompt_and_what_ties_do() -> None:
    reward = np.array([0.1, 0.9, 0.5, 0.5, np.nan, 0.3], dtype=np.float32)
    assert best_and_worst(reward, [0, 0, 1, 1, 2, 2]) == [(1, 0), (2, 3)]
    (scored,) = scored_of(ToyPolicy(), PLAN, count=1)
    same = replace(scored, total_B=np.zeros(8, dtype=np.float32))
    assert len(DiffusionDPO().make_batch([same], Memory())) == 0
    halves = DiffusionDPO(ties="half").make_batch([same], Memory())
    assert halves.pairs[0].label_B.tolist() == [0.5] * 4
    batch = DiffusionDPO(draws=3).make_batch([scored], Memory())
    assert len(batch) == 4
    assert sum(p.weight for p in batch.passes(1)) == pytest.approx(1.0)
    assert (
        len({p.key for p in batch.passes(1, (1, 0))} | {p.key for p in batch.passes(1, (2, 0))})
        == 6
    )


def test_o10_d3po_by_differences_and_zero_outside() -> None:
    """Inside the range the per-step DPO gradient; with both ratios pushed out exactly 0; at the
    reference ln 2."""
    policy = ToyPolicy(dtype=torch.float64)
    one = in_float64(next(iter(D3PO().make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    assert sorted(one.side_B.tolist()) == [-1.0] * 4 + [1.0] * 4, (
        "two samples a prompt: one wins, one loses"
    )
    assert D3PO().loss(one, policy).value.item() == pytest.approx(math.log(2.0), abs=1e-12)
    moved(policy, 0.02)
    algorithm = D3PO(beta=2.0, clip_range=0.9)
    found = gradient(algorithm.loss(one, policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-6
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-9)
    moved(policy, 1.0)
    outside = D3PO(beta=2.0, clip_range=1e-6)
    assert outside.loss(one, policy).means["reference_ratio/clip_fraction"].item() == 1.0
    assert gradient(outside.loss(one, policy).value, policy).abs().max() == 0.0


def test_o10_d3po_without_strength_is_ln_2() -> None:
    """beta -> 0 away from the reference: |loss - ln 2| <= beta |log R_w - log R_l| / 2, and the
    gradient goes with beta."""
    policy = ToyPolicy(dtype=torch.float64)
    one = in_float64(next(iter(D3PO().make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    moved(policy, 0.02)
    assert (
        abs(D3PO(beta=10.0, clip_range=0.9).loss(one, policy).value.item() - math.log(2.0)) > 1e-3
    )
    for beta in (1e-3, 1e-6, 1e-12):
        loss = D3PO(beta=beta, clip_range=0.9).loss(one, policy).value
        assert loss.item() == pytest.approx(math.log(2.0), abs=2 * beta)
        assert gradient(loss, policy).abs().max() < 10 * beta


def test_a_pass_of_ties_alone_is_no_loss() -> None:
    policy = ToyPolicy()
    scored = [replace(s, total_B=np.zeros(8, dtype=np.float32)) for s in scored_of(policy, PLAN)]
    for one in D3PO().make_batch(scored, Memory()).passes(1):
        assert gradient(D3PO().loss(one, policy).value, policy).abs().max() == 0.0
