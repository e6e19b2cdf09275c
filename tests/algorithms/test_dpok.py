"""DPOK: lemma 4.2 in numbers, the two forms of its KL, the clipped ratio, the value network, replay."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlalign import objectives
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.dpok import DPOK
from rlalign.diffusion.rollout import replay
from rlalign.memory import Memory
from rlalign.records import Plan
from tests.algorithms.helpers import in_float64, numeric_gradient, scored_of
from tests.toy import ToyPolicy, gradient

PLAN = Plan(steps=4, eta=1.0)


def moved(policy: ToyPolicy, by: float = 0.05) -> ToyPolicy:
    """The policy some way from its reference."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += by * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype)).view_as(parameter)
    return policy


def test_o7_the_path_kl_bounds_the_marginal() -> None:
    """A chain x' = a x + b + s z against a constant shift of b, both sides in closed form.

    KL(path) = sum of delta_k^2 / (2 s_k^2); the marginals differ by sum of g_k delta_k under variance Var(x_0).
    """
    a, delta = (0.9, 0.8, 0.95, 0.7, 0.85), (0.1, -0.05, 0.2, 0.02, 0.03)
    s = (0.5, 0.4, 0.3, 0.25, 0.2)
    gains = [math.prod(a[k + 1 :]) for k in range(5)]
    variance = math.prod(a) ** 2 + sum((g * sigma) ** 2 for g, sigma in zip(gains, s, strict=True))
    means = [torch.zeros(1, 1), *(torch.full((1, 1), d) for d in delta)]
    path = sum(
        objectives.gaussian_kl(mean, means[0], torch.tensor(sigma)).item()
        for mean, sigma in zip(means[1:], s, strict=True)
    )
    marginal = sum(g * d for g, d in zip(gains, delta, strict=True)) ** 2 / (2 * variance)
    assert path == pytest.approx(sum(d**2 / (2 * sigma**2) for d, sigma in zip(delta, s, strict=True)), rel=1e-6)
    assert path > marginal > 0


def test_the_kl_in_the_loss_is_the_gaussian_one_and_has_a_gradient() -> None:
    """float64, reward term off by zero advantages: loss = kl_weight * KL(step || reference step), its gradient by differences."""
    policy = moved(ToyPolicy(dtype=torch.float64))
    algorithm = DPOK(kl_weight=0.7)
    batch = algorithm.make_batch(scored_of(policy, PLAN), Memory())
    one = in_float64(next(iter(batch.passes(2))))
    one = type(one)(**{**vars(one), "advantage_B": torch.zeros_like(one.advantage_B)})
    condition = policy.encode(one.unit.prompts).rows(2)
    with torch.no_grad():
        mine = replay(policy, one.unit, one.latents_BK1, one.steps, condition).gaussian
        with policy.as_reference():
            theirs = replay(policy, one.unit, one.latents_BK1, one.steps, condition).gaussian
    wanted = 0.7 * mine.kl(theirs).mean()
    loss = algorithm.loss(one, policy)
    assert loss.value.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert loss.means["kl/per_step_gaussian"].item() == pytest.approx(wanted.item() / 0.7, rel=1e-10)
    found, differences = (
        gradient(loss.value, policy),
        numeric_gradient(lambda: algorithm.loss(one, policy).value, policy),
    )
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


def test_the_noise_form_is_another_number() -> None:
    """|noise - noise_ref|^2: on the DDIM path it is the Gaussian KL without (d mean / d noise)^2 / (2 std^2) of each step."""
    policy = moved(ToyPolicy(dtype=torch.float64))
    scored = scored_of(policy, PLAN)
    for one in DPOK().make_batch(scored, Memory()).passes(1):
        one = in_float64(one)
        condition = policy.encode(one.unit.prompts)
        with torch.no_grad():
            mine = replay(policy, one.unit, one.latents_BK1, one.steps, condition)
            with policy.as_reference():
                theirs = replay(policy, one.unit, one.latents_BK1, one.steps, condition)
        noise = objectives.noise_kl(mine.noise, theirs.noise)
        exact = objectives.gaussian_kl(mine.gaussian.mean, theirs.gaussian.mean, mine.gaussian.std)
        path, levels = policy.path, policy.path.levels(PLAN.steps)
        k = one.steps[0]
        alpha, sigma = path.alpha(levels[k]), path.sigma(levels[k])
        alpha_next, sigma_next = path.alpha(levels[k + 1]), path.sigma(levels[k + 1])
        direction = (sigma_next**2 - mine.gaussian.std.double() ** 2).clamp(min=0).sqrt()
        slope = direction - alpha_next * sigma / alpha
        factor = slope**2 / (2 * mine.gaussian.std**2)
        assert torch.allclose(exact, factor * noise, rtol=1e-6)


def test_at_the_reference_without_a_weight_it_is_ddpo() -> None:
    """kl_weight 0 and the surrogate's clip: the same value and gradient as DDPO with the same advantages (float64, 1e-12)."""
    policy = ToyPolicy(dtype=torch.float64)
    scored = scored_of(policy, PLAN)
    plain, kept = DDPO(advantage="group", clip_range=0.1), DPOK(kl_weight=0.0, clip="surrogate", clip_range=0.1)
    for mine, theirs in zip(
        kept.make_batch(scored, Memory()).passes(2), plain.make_batch(scored, Memory()).passes(2), strict=True
    ):
        found = gradient(kept.loss(in_float64(mine), policy).value, policy)
        wanted = gradient(plain.loss(in_float64(theirs), policy).value, policy)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("advantage", "ratio"), [(1.0, 1.3), (-1.0, 1.3), (1.0, 0.7), (-1.0, 0.7)])
def test_outside_the_range_the_clipped_ratio_has_no_gradient(advantage: float, ratio: float) -> None:
    """For either sign of A; the surrogate keeps it where clipping would hide a worse policy."""
    r = torch.tensor([ratio], requires_grad=True)
    objectives.clamped_ratio(r, torch.tensor([advantage]), 0.2).sum().backward()
    assert r.grad is not None
    assert r.grad.item() == 0.0


def test_the_value_network_starts_at_nothing_and_learns_the_advantage() -> None:
    """Its head starts at 0; 200 updates on one batch cut its squared error by more than half (seed 0)."""
    policy = ToyPolicy()
    algorithm = DPOK(value_lr=1e-2, kl_weight=0.0)
    made = algorithm.critic(policy, PLAN)
    assert made is not None
    policy.critic, lr = made
    batch = algorithm.make_batch(scored_of(policy, PLAN), Memory())
    passes = list(batch.passes(4))
    first = [algorithm.loss(p, policy).means["value/error"].item() for p in passes]
    assert np.mean(first) == pytest.approx(np.mean([(p.advantage_B**2).mean().item() for p in passes]), rel=1e-5)
    optimiser = torch.optim.Adam(policy.critic.parameters(), lr=lr)
    for _ in range(200):
        optimiser.zero_grad()
        sum((algorithm.loss(p, policy).value for p in passes), torch.zeros(())).backward()
        optimiser.step()
    last = [algorithm.loss(p, policy).means["value/error"].item() for p in passes]
    assert np.mean(last) < 0.5 * np.mean(first)


def test_replay_joins_earlier_rounds_with_their_own_log_probs() -> None:
    policy, algorithm, memory = ToyPolicy(), DPOK(replay=1, clip_range=0.1), Memory()
    first = algorithm.make_batch(scored_of(policy, PLAN), memory)
    moved(policy)
    second = algorithm.make_batch(scored_of(policy, PLAN), memory)
    third = algorithm.make_batch(scored_of(policy, PLAN), memory)
    assert (first.parts, second.parts, third.parts) == (2, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(second.log_prob[:2], first.log_prob, strict=True))
    deviations = [algorithm.loss(p, policy).maxima["ratio/max_deviation"].item() for p in second.passes(1)]
    assert max(deviations[8:]) == 0.0, "the fresh half"
    assert max(deviations[:8]) > 1e-4, "the half that another policy made"
    assert algorithm.ratio_limit is None
