"""Weighted denoising: RWR's weights and DiffusionNFT's pull, against closed forms and finite
differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.diffusion_nft import DiffusionNFT
from rlalign.algorithms.reinforce import Reinforce
from rlalign.algorithms.rwr import RWR
from rlalign.core.batches import ImagePass
from rlalign.core.copies import Decay
from rlalign.core.records import Plan
from rlalign.policies.base import Condition, Words
from tests.algorithms.helpers import FlowToy, in_float64, numeric_gradient, scored_of
from tests.algorithms.test_dpok import moved
from tests.toy import ToyPolicy, gradient

ODE = Plan(steps=4, eta=0.0)


def wide(one: ImagePass) -> ImagePass:
    return replace(one, clean_BCHW=one.clean_BCHW.double(), weight_B=one.weight_B.double())


def test_o13_weighted_regression_moves_a_gaussian_by_the_tilt() -> None:
    """p = N(.5, 1.2^2), r = .6 x, temperature .8: the weighted mean is .5 + 1.2^2 * .6 / .8 = 1.58,
    the std stays.

    200 000 draws, seed 0, margin .02.
    """
    x = torch.from_numpy(np.random.default_rng(0).normal(0.5, 1.2, 200_000))
    weight = objectives.reward_weights(0.6 * x, 0.8)
    assert weight.mean().item() == pytest.approx(1.0, abs=1e-9)
    mean = (weight * x).mean()
    assert mean.item() == pytest.approx(1.58, abs=0.02)
    assert ((weight * (x - mean) ** 2).mean()).sqrt().item() == pytest.approx(1.2, abs=0.02)


def test_o5_the_weights_tilt() -> None:
    """p exp(r / beta) of N(0, 1) with r = -(x - 1.5)^2, beta .5: mean 1.2, variance .2 (200 001
    points of a grid)."""
    x = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    weight = objectives.reward_weights(-((x - 1.5) ** 2), 0.5) * density
    mean = float((weight * x).sum() / weight.sum())
    assert mean == pytest.approx(1.2, abs=1e-9)
    assert float((weight * (x - mean) ** 2).sum() / weight.sum()) == pytest.approx(0.2, abs=1e-9)


def test_o5_a_linear_reward_moves_a_gaussian_and_keeps_its_std() -> None:
    """p exp(r / beta) of N(m, s^2) with r = a x is N(m + a s^2 / beta, s^2): all moments by
    quadrature (1e-9)."""
    m, s, a, beta = 0.3, 0.8, -1.7, 0.6
    x = torch.linspace(m - 14 * s, m + 14 * s, 200_001, dtype=torch.float64)
    weight = objectives.reward_weights(a * x, beta) * torch.exp(-(((x - m) / s) ** 2) / 2)
    weight = weight / weight.sum()
    mean = float((weight * x).sum())
    assert mean == pytest.approx(m + a * s**2 / beta, abs=1e-9)
    moments = [float((weight * ((x - mean) / s) ** k).sum()) for k in (2, 3, 4)]
    assert moments == pytest.approx([1.0, 0.0, 3.0], abs=1e-8)


def test_rwr_weights_by_prompt_and_by_quantile() -> None:
    (scored,) = scored_of(ToyPolicy(), ODE, count=1)
    rewards = np.array([0, 1, 2, 3, 4, 5, 6, np.nan], dtype=np.float32)
    one = replace(scored, total_B=rewards)
    whole = RWR(temperature=2.0).make_batch([one], Memory()).weight[0]
    assert whole[-1].item() == 0.0
    assert torch.allclose(whole[:7], 7 * torch.softmax(torch.arange(7.0) / 2.0, 0), atol=1e-6)
    sparse = RWR(sparse=0.5).make_batch([one], Memory()).weight[0]
    assert sparse.tolist() == pytest.approx([0, 0, 0, 7 / 4, 7 / 4, 7 / 4, 7 / 4, 0])
    groups = RWR(over="prompt", temperature=2.0).make_batch([one], Memory()).weight[0]
    assert [round(groups[[i, i + 4]].sum().item(), 5) for i in range(3)] == [2.0] * 3, (
        "each prompt's weights have mean 1"
    )


@pytest.mark.parametrize("make", [ToyPolicy, FlowToy])
def test_rwr_is_the_denoising_loss_weighted(make: type[ToyPolicy]) -> None:
    policy = make(dtype=torch.float64)
    algorithm = RWR(temperature=1.0, draws=3)
    batch = algorithm.make_batch(scored_of(policy, ODE), Memory())
    passes = list(batch.passes(1, (1, 0)))
    assert len(passes) == 2 * 3
    assert len({p.key for p in passes}) == 6
    one = wide(passes[1])
    found = gradient(algorithm.loss(one, policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)
    even = replace(one, weight_B=torch.ones_like(one.weight_B))
    loss = algorithm.loss(even, policy)
    assert loss.value.item() == pytest.approx(loss.means["denoising_error"].item(), rel=1e-12)


def test_a_dropped_condition_is_the_empty_one_in_all_its_parts() -> None:
    """Token embeddings and the pooled vector, row by row."""
    shapes = {"embeds_BLD": (3, 2, 4), "pooled_BD": (3, 5)}
    own, empty = (Words({n: torch.randn(shape) for n, shape in shapes.items()}) for _ in range(2))
    empty_B = torch.tensor([True, False, True])
    found = Condition(caption=own, empty=empty).dropped(empty_B).caption
    assert found.tensors.keys() == shapes.keys()
    for name in shapes:
        assert torch.equal(found[name][empty_B], empty[name][empty_B])
        assert torch.equal(found[name][~empty_B], own[name][~empty_B])


@pytest.mark.parametrize(("share", "empty"), [(0.0, 0), (1.0, 8), (0.5, 3)])
def test_dropped_captions_are_asked_with_the_empty_one(share: float, empty: int) -> None:
    """RWR's caption dropout: the rows that are dropped get ``uncond``, the others their own; how
    many, by the pass's key."""

    class Watched(ToyPolicy):
        def error(self, clean, noise, level, condition):  # type: ignore[no-untyped-def]
            self.asked = condition
            return super().error(clean, noise, level, condition)

    policy = Watched()
    algorithm = RWR(caption_dropout=share)
    one = next(iter(algorithm.make_batch(scored_of(policy, ODE), Memory()).passes(1, (1, 0))))
    algorithm.loss(one, policy)
    own = policy.encode(one.unit.prompts)
    asked_BLD = policy.asked.caption["embeds_BLD"]
    dropped = [bool((asked_BLD[i] == own.empty["embeds_BLD"][i]).all()) for i in range(8)]
    kept = [bool((asked_BLD[i] == own.caption["embeds_BLD"][i]).all()) for i in range(8)]
    assert [not k for k in kept] == dropped
    assert sum(dropped) == empty


def test_o12_the_gradient_at_the_old_policy() -> None:
    """Unnormalised: 2 (2 r - 1) (old - clean) / D; r = 1/2 pulls nowhere; it does not depend on
    beta there."""
    old = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    clean = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    for share in (0.0, 0.3, 0.5, 1.0):
        for beta in (0.1, 1.0):
            new = old.clone().requires_grad_(True)
            value = objectives.forward_reinforcement(
                new,
                old,
                clean,
                torch.tensor([share], dtype=torch.float64),
                beta=beta,
                self_normalised=False,
            )
            (found,) = torch.autograd.grad(value.sum(), new)
            assert torch.allclose(
                found, 2 * (2 * share - 1) * (old - clean) / 2, rtol=1e-12, atol=1e-12
            )


def test_o12_the_minimiser() -> None:
    """v = old + (2 r - 1) (clean - old) / beta: the gradient vanishes there."""
    old = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    clean = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    for share, beta in ((0.8, 0.5), (0.2, 1.0), (0.5, 0.3)):
        best = (old + (2 * share - 1) * (clean - old) / beta).requires_grad_(True)
        value = objectives.forward_reinforcement(
            best,
            old,
            clean,
            torch.tensor([share], dtype=torch.float64),
            beta=beta,
            self_normalised=False,
        )
        (found,) = torch.autograd.grad(value.sum(), best)
        assert found.abs().max() < 1e-12


@pytest.mark.parametrize("make", [ToyPolicy, FlowToy])
def test_nft_by_finite_differences(make: type[ToyPolicy]) -> None:
    """With the self-normalisation off (its scale is detached) and the reference's term on."""
    policy = make(dtype=torch.float64)
    policy.snapshots = {"behaviour": policy.weights()}
    algorithm = DiffusionNFT(self_normalised=False, kl_weight=0.3, beta=0.7)
    batch = algorithm.make_batch(scored_of(policy, ODE), Memory())
    assert all(w.min() >= 0.0 and w.max() <= 1.0 for w in batch.weight)
    one = wide(next(iter(batch.passes(1, (1, 0)))))
    moved(policy, 0.02)
    found = gradient(algorithm.loss(one, policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nfts_own_scale_is_not_differentiated(beta: float) -> None:
    """By default each side is divided by w = mean |x - clean|, which is held fixed.

    d/dnew = 2 (r (x+ - clean) / w+ - (1 - r) (x- - clean) / w-) / D, written out (1e-12); beta
    cancels but for x+ and x-.
    """
    rng = np.random.default_rng(0)
    old, clean = (torch.from_numpy(rng.standard_normal((4, 6))) for _ in range(2))
    new = (old + 0.2 * torch.from_numpy(rng.standard_normal((4, 6)))).requires_grad_(True)
    share_B = torch.tensor([0.0, 0.35, 0.5, 1.0], dtype=torch.float64)
    value_B = objectives.forward_reinforcement(new, old, clean, share_B, beta=beta)
    (found,) = torch.autograd.grad(value_B.sum(), new)
    with torch.no_grad():
        towards, away = (
            ((1 - beta) * old + beta * new - clean),
            ((1 + beta) * old - beta * new - clean),
        )
        r = share_B[:, None]
        wanted = 2 / 6 * (r * towards / towards.abs().mean(1, keepdim=True))
        wanted -= 2 / 6 * (1 - r) * away / away.abs().mean(1, keepdim=True)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_nft_by_default_is_that_gradient_through_the_network() -> None:
    """The class with beta 1 and its own scale, as by default: the written-out pull on what the
    network says (float64, 1e-10)."""
    seen: list[torch.Tensor] = []

    class Watched(FlowToy):
        def denoise(self, x, level, condition, guidance):  # type: ignore[no-untyped-def]
            clean, noise = super().denoise(x, level, condition, guidance)
            seen.append(clean)
            return clean, noise

    policy = Watched(dtype=torch.float64)
    policy.snapshots = {"behaviour": policy.weights()}
    algorithm = DiffusionNFT(kl_weight=0.0)
    one = wide(
        next(iter(algorithm.make_batch(scored_of(FlowToy(), ODE), Memory()).passes(1, (1, 0))))
    )
    moved(policy, 0.02)
    found = gradient(algorithm.loss(one, policy).value, policy)
    seen.clear()
    algorithm.loss(one, policy)
    old, new = seen  # in this order: the behaviour copy without gradient, then the policy
    assert not old.requires_grad and new.requires_grad
    towards, away = (new - one.clean_BCHW).detach(), (2 * old - new - one.clean_BCHW).detach()
    r = one.weight_B[:, None, None, None]
    scales = [side.flatten(1).abs().mean(1)[:, None, None, None] for side in (towards, away)]
    pull = (
        algorithm.advantage_clip
        * 2
        / (2 * len(new))
        * (r * towards / scales[0] - (1 - r) * away / scales[1])
    )
    wanted = gradient((pull * new).sum(), policy)
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_nft_draws_take_different_levels_of_the_plan() -> None:
    class Watched(ToyPolicy):
        seen: list[float]

        def denoise(self, x, level, condition, guidance):  # type: ignore[no-untyped-def]
            self.seen.append(float(level.flatten()[0]))
            return super().denoise(x, level, condition, guidance)

    policy = Watched()
    policy.snapshots = {"behaviour": policy.weights()}
    algorithm = DiffusionNFT(draws=4, kl_weight=0.0)
    scored = scored_of(ToyPolicy(), ODE, count=1)
    policy.seen = []
    for one in algorithm.make_batch(scored, Memory()).passes(1, (1, 0)):
        algorithm.loss(one, policy)
    assert sorted(set(policy.seen)) == sorted(policy.path.levels(4)[:-1].tolist())


def test_o23_reinforce_is_d_times_k_times_ddpos_score_function() -> None:
    """Equal advantages, float64: the joint log-prob, summed over steps, against the mean over
    elements and steps (1e-9)."""
    policy = ToyPolicy(dtype=torch.float64)
    scored = scored_of(policy, Plan(steps=4, eta=1.0))
    literal = Reinforce().make_batch(scored, Memory())
    totals = {}
    for algorithm in (Reinforce(), DDPO(form="score_function")):
        value = torch.zeros((), dtype=torch.float64)
        for one in literal.passes(2):
            value = value + algorithm.loss(in_float64(one), policy).value * one.weight
        totals[algorithm.name] = gradient(value, policy)
    assert totals["reinforce"].abs().max() > 1e-3
    assert torch.allclose(totals["reinforce"], 2 * 4 * totals["ddpo"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # the published type 1, by update: min(0.001 n, 0.5)
        ({}, {1: 0.001, 400: 0.4, 500: 0.5, 900: 0.5}),
        # type 2 of two updates a round: 0 up to update 75, then 0.0075 each, up to 0.999
        (
            {"decay_slope": 0.015, "decay_most": 0.999, "decay_after": 37.5},
            {1: 0.0, 37: 0.0, 38: 0.0075, 60: 0.3375, 104: 0.9975, 105: 0.999, 500: 0.999},
        ),
    ],
)
def test_the_old_policys_decay_by_round(
    settings: dict[str, float], wanted: dict[int, float]
) -> None:
    decay = DiffusionNFT(**settings).copies["behaviour"]  # type: ignore[arg-type]
    assert isinstance(decay, Decay)
    found = {round: decay.of_round(round) for round in wanted}
    assert found == pytest.approx(wanted, abs=1e-12)
