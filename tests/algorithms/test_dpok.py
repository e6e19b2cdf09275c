"""DPOK: lemma 4.2 in numbers, the two forms of its KL, the clipped ratio, the value network,
replay."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.dpok import DPOK
from rlalign.core.prompts import Prompt, record_of
from rlalign.core.records import Plan, with_prompts
from rlalign.diffusion.rollout import replay
from rlalign.diffusion.steps import Gaussian
from tests.algorithms.helpers import in_float64, numeric_gradient, scored_of
from tests.toy import ToyPolicy, gradient

PLAN = Plan(steps=4, eta=1.0)


def moved(policy: ToyPolicy, by: float = 0.05) -> ToyPolicy:
    """The policy some way from its reference."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += by * torch.sin(
                torch.arange(parameter.numel(), dtype=parameter.dtype)
            ).view_as(parameter)
    return policy


A, S = (0.9, 0.8, 0.95, 0.7, 0.85), (0.5, 0.4, 0.3, 0.2, 0.1)
GAINS = [math.prod(A[k + 1 :]) for k in range(5)]
VARIANCE = math.prod(A) ** 2 + sum((g * s) ** 2 for g, s in zip(GAINS, S, strict=True))
"""Of x_0 in the chain x' = a x + b + s z that starts at x_T ~ N(0, 1)."""


def test_o7_a_constant_shift() -> None:
    """KL(path) = .30003 is no less than KL(marginal) = .04942."""
    delta = (0.1, -0.05, 0.2, 0.02, 0.03)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    path = sum(
        objectives.gaussian_kl(zero + d, zero, torch.tensor(s, dtype=torch.float64)).item()
        for d, s in zip(delta, S, strict=True)
    )
    marginal = sum(g * d for g, d in zip(GAINS, delta, strict=True)) ** 2 / (2 * VARIANCE)
    assert path == pytest.approx(0.30003, abs=5e-6)
    assert marginal == pytest.approx(0.04942, abs=5e-6)


def test_o7_a_shift_of_the_slope() -> None:
    """a + .1: .75949 against .29021. The path KL is E of the per-step KL under the shifted chain,
    by Gauss-Hermite nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = torch.from_numpy(weights / weights.sum())
    variance, path = 1.0, 0.0
    for a, s in zip(A, S, strict=True):
        x = torch.from_numpy(nodes)[:, None] * math.sqrt(variance)
        kl = objectives.gaussian_kl((a + 0.1) * x, a * x, torch.tensor(s, dtype=torch.float64))
        path += float((weights * kl).sum())
        variance = (a + 0.1) ** 2 * variance + s**2
    marginal = 0.5 * (variance / VARIANCE - 1 - math.log(variance / VARIANCE))
    assert path == pytest.approx(0.75949, abs=5e-6)
    assert marginal == pytest.approx(0.29021, abs=5e-6)


@pytest.mark.parametrize(
    ("shift", "slope", "expected"),
    [((0.1, -0.05, 0.2, 0.02, 0.03), 0.0, 0.30003), ((0.0,) * 5, 0.1, 0.75949)],
)
def test_o7_the_mean_log_ratio_of_sampled_paths_is_the_path_kl(
    shift: tuple[float, ...], slope: float, expected: float
) -> None:
    """200 000 paths of the shifted chain, seed 0: mean of sum log p - log p_ref within 4 of its
    standard errors (< .005)."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((200_000, 1)))
    log_ratio = torch.zeros(len(x), dtype=torch.float64)
    for a, b, s in zip(A, shift, S, strict=True):
        std = torch.tensor(s, dtype=torch.float64)
        mine, theirs = Gaussian(mean=(a + slope) * x + b, std=std), Gaussian(mean=a * x, std=std)
        x = mine.sample(torch.from_numpy(rng.standard_normal(x.shape)))
        log_ratio += mine.log_prob(x) - theirs.log_prob(x)
    error = log_ratio.std().item() / math.sqrt(len(x))
    assert error < 0.005
    assert log_ratio.mean().item() == pytest.approx(expected, abs=4 * error)


def test_o6_the_optimum_of_the_path_kl_is_not_the_tilt() -> None:
    """r = x_0, beta = .5: the optimal biases are g s^2 / beta, a shift of .34601; the tilted
    marginal's is .67727."""
    beta = 0.5
    bias = torch.tensor(
        [g * s**2 / beta for g, s in zip(GAINS, S, strict=True)],
        dtype=torch.float64,
        requires_grad=True,
    )
    gains, stds = torch.tensor(GAINS, dtype=torch.float64), torch.tensor(S, dtype=torch.float64)
    kl = objectives.gaussian_kl(
        bias[:, None], torch.zeros(5, 1, dtype=torch.float64), stds[:, None]
    ).sum()
    ((gains * bias).sum() - beta * kl).backward()
    assert bias.grad is not None
    assert bias.grad.abs().max() < 1e-12
    shift = float((gains * bias).sum().detach())
    assert shift == pytest.approx(0.34601, abs=5e-6)
    assert VARIANCE / beta == pytest.approx(0.67727, abs=5e-6)
    assert VARIANCE / beta - shift == pytest.approx(math.prod(A) ** 2 / beta), (
        "the part of x_T, which nobody can tilt"
    )


def test_the_kl_in_the_loss_is_the_gaussian_one_and_has_a_gradient() -> None:
    """float64, reward term off by zero advantages: loss = kl_weight * KL(step || reference step),
    its gradient by differences."""
    policy = moved(ToyPolicy(dtype=torch.float64))
    algorithm = DPOK(kl_weight=0.7)
    batch = algorithm.make_batch(scored_of(policy, PLAN), Memory())
    one = in_float64(next(iter(batch.passes(2))))
    one = type(one)(**{**vars(one), "advantage_B": torch.zeros_like(one.advantage_B)})
    condition = policy.encode(one.unit.prompts).rows(2)
    with torch.no_grad():
        mine = replay(policy, one.unit, one.before_BS, one.steps, condition).gaussian
        with policy.as_reference():
            theirs = replay(policy, one.unit, one.before_BS, one.steps, condition).gaussian
    wanted = 0.7 * mine.kl(theirs).mean()
    loss = algorithm.loss(one, policy)
    assert loss.value.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert loss.means["kl/per_step_gaussian"].item() == pytest.approx(
        wanted.item() / 0.7, rel=1e-10
    )
    found, differences = (
        gradient(loss.value, policy),
        numeric_gradient(lambda: algorithm.loss(one, policy).value, policy),
    )
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


def test_the_noise_form_is_another_number() -> None:
    """|noise - noise_ref|^2: on the DDIM path it is the Gaussian KL without (d mean / d noise)^2 /
    (2 std^2) of each step."""
    policy = moved(ToyPolicy(dtype=torch.float64))
    scored = scored_of(policy, PLAN)
    for one in DPOK().make_batch(scored, Memory()).passes(1):
        one = in_float64(one)
        condition = policy.encode(one.unit.prompts)
        with torch.no_grad():
            mine = replay(policy, one.unit, one.before_BS, one.steps, condition)
            with policy.as_reference():
                theirs = replay(policy, one.unit, one.before_BS, one.steps, condition)
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


def test_the_noise_forms_gradient_by_differences() -> None:
    """kl_form noise, reward term off: loss = kl_weight |noise - noise_ref|^2, no gradient through
    the reference (float64)."""
    policy = moved(ToyPolicy(dtype=torch.float64))
    algorithm = DPOK(kl_weight=0.7, kl_form="noise")
    one = in_float64(next(iter(algorithm.make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    one = type(one)(**{**vars(one), "advantage_B": torch.zeros_like(one.advantage_B)})
    loss = algorithm.loss(one, policy)
    gaussian = DPOK(kl_weight=0.7).loss(one, policy).value.item()
    assert loss.value.item() != pytest.approx(gaussian, rel=0.1), (
        "another number than the Gaussian form's"
    )
    assert loss.means["kl/per_step_gaussian"].item() == pytest.approx(gaussian / 0.7, rel=1e-10), (
        "which is what is logged"
    )
    found = gradient(loss.value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("clip", ["ratio", "surrogate"])
def test_the_reward_terms_gradient_in_range_by_differences(clip: str) -> None:
    """No KL, ratios within the range: -reward_weight A r, its gradient by central differences
    (float64)."""
    policy = ToyPolicy(dtype=torch.float64)
    algorithm = DPOK(kl_weight=0.0, clip=clip, clip_range=0.2, reward_weight=3.0)
    one = in_float64(next(iter(algorithm.make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    moved(policy, 2e-3)
    loss = algorithm.loss(one, policy)
    assert 1e-4 < loss.maxima["ratio/max_deviation"].item() < 0.2
    assert loss.means["ratio/clip_fraction"].item() == 0.0
    found = gradient(loss.value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-3
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-8)


def test_beyond_the_range_the_class_has_no_gradient() -> None:
    """By default (clip ratio): every ratio pushed out by e^+-0.5 at c = .2 leaves exactly nothing,
    for either sign of A."""
    policy = ToyPolicy(dtype=torch.float64)
    algorithm = DPOK(kl_weight=0.0, clip_range=0.2)
    assert algorithm.clip == "ratio"
    one = in_float64(next(iter(algorithm.make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    assert {-1.0, 1.0} == {float(np.sign(a)) for a in one.advantage_B}
    for shift in (-0.5, 0.5):
        out = type(one)(**{**vars(one), "log_prob_BS": one.log_prob_BS - shift})
        loss = algorithm.loss(out, policy)
        assert loss.means["ratio/clip_fraction"].item() == 1.0
        assert gradient(loss.value, policy).abs().max().item() == 0.0


def test_at_the_reference_without_a_weight_it_is_ddpo() -> None:
    """kl_weight 0 and the surrogate's clip: the same value and gradient as DDPO with the same
    advantages (float64, 1e-12)."""
    policy = ToyPolicy(dtype=torch.float64)
    scored = scored_of(policy, PLAN)
    plain, kept = (
        DDPO(advantage="group", clip_range=0.1),
        DPOK(kl_weight=0.0, clip="surrogate", clip_range=0.1),
    )
    for mine, theirs in zip(
        kept.make_batch(scored, Memory()).passes(2),
        plain.make_batch(scored, Memory()).passes(2),
        strict=True,
    ):
        found = gradient(kept.loss(in_float64(mine), policy).value, policy)
        wanted = gradient(plain.loss(in_float64(theirs), policy).value, policy)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("advantage", "ratio"), [(1.0, 1.3), (-1.0, 1.3), (1.0, 0.7), (-1.0, 0.7)])
def test_outside_the_range_the_clipped_ratio_has_no_gradient(
    advantage: float, ratio: float
) -> None:
    """For either sign of A; the surrogate keeps it where clipping would hide a worse policy."""
    r = torch.tensor([ratio], requires_grad=True)
    objectives.clamped_ratio(r, torch.tensor([advantage]), 0.2).sum().backward()
    assert r.grad is not None
    assert r.grad.item() == 0.0


@pytest.mark.slow
def test_the_value_network_starts_at_nothing_and_learns_the_advantage() -> None:
    """Its head starts at 0; 200 updates on one batch cut its squared error by more than half (seed
    0)."""
    policy = ToyPolicy()
    algorithm = DPOK(value_lr=1e-2, kl_weight=0.0)
    made = algorithm.critic(policy, PLAN)
    assert made is not None
    critic, lr = made
    batch = algorithm.make_batch(scored_of(policy, PLAN), Memory())
    passes = list(batch.passes(4))
    first = [algorithm.loss(p, policy, critic).means["value/error"].item() for p in passes]
    assert np.mean(first) == pytest.approx(
        np.mean([(p.advantage_B**2).mean().item() for p in passes]), rel=1e-5
    )
    optimiser = torch.optim.Adam(critic.parameters(), lr=lr)
    for _ in range(200):
        optimiser.zero_grad()
        sum((algorithm.loss(p, policy, critic).value for p in passes), torch.zeros(())).backward()
        optimiser.step()
    last = [algorithm.loss(p, policy, critic).means["value/error"].item() for p in passes]
    assert np.mean(last) < 0.5 * np.mean(first)


def test_the_critics_value_is_taken_off_and_learned_apart() -> None:
    """With V: the policy's gradient is that of A - V held fixed, V's that of (V - A)^2 alone
    (float64, differences)."""
    policy = ToyPolicy(dtype=torch.float64)
    algorithm = DPOK(kl_weight=0.0, clip="surrogate", clip_range=0.2, value_lr=1e-3)
    made = algorithm.critic(policy, PLAN)
    assert made is not None
    critic = made[0].double()
    with torch.no_grad():
        for parameter in critic.head.parameters():
            parameter += 0.02 * torch.sin(
                torch.arange(parameter.numel(), dtype=torch.float64)
            ).view_as(parameter)
    one = in_float64(next(iter(algorithm.make_batch(scored_of(policy, PLAN), Memory()).passes(2))))
    rows, steps = one.before_BS.shape[0], list(one.steps)
    condition = policy.encode(one.unit.prompts)
    values = [
        critic(one.before_BS[:, s], torch.full((rows,), k), condition.caption.summary_BD).detach()
        for s, k in enumerate(steps)
    ]
    assert torch.stack(values).std() > 1e-4
    # the policy's part: per step DDPO's own loss on advantages less the values
    plain, total = DDPO(clip_range=0.2), torch.zeros((), dtype=torch.float64)
    for number, value_B in enumerate(values):
        alone = type(one)(
            **{
                **vars(one),
                "steps": (steps[number],),
                "before_BS": one.before_BS[:, [number]],
                "after_BS": one.after_BS[:, [number]],
                "log_prob_BS": one.log_prob_BS[:, [number]],
                "advantage_B": one.advantage_B - value_B,
            }
        )
        total = total + plain.loss(alone, policy).value / len(steps)
    wanted = gradient(total, policy)
    assert wanted.abs().max() > 1e-3
    loss = algorithm.loss(one, policy, critic)
    assert torch.allclose(gradient(loss.value, policy), wanted, rtol=0, atol=1e-10)
    # the critic's part
    error = torch.stack([(v - one.advantage_B) ** 2 for v in values]).mean()
    assert loss.means["value/error"].item() == pytest.approx(error.item(), rel=1e-10)
    head = critic.head.weight
    (found,) = torch.autograd.grad(algorithm.loss(one, policy, critic).value, head)
    for entry in (0, 100, 255):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                head[0, entry] += sign * 1e-6
                ends.append(algorithm.loss(one, policy, critic).means["value/error"].item())
                head[0, entry] -= sign * 1e-6
        assert found[0, entry].item() == pytest.approx(
            (ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-9
        )


def test_replay_joins_earlier_rounds_with_their_own_log_probs() -> None:
    policy, algorithm, memory = ToyPolicy(), DPOK(replay=1, clip_range=0.1), Memory()
    first = algorithm.make_batch(scored_of(policy, PLAN), memory)
    moved(policy)
    second = algorithm.make_batch(scored_of(policy, PLAN), memory)
    third = algorithm.make_batch(scored_of(policy, PLAN), memory)
    assert (first.parts, second.parts, third.parts) == (2, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(second.log_prob[:2], first.log_prob, strict=True))
    deviations = [
        algorithm.loss(p, policy).maxima["ratio/max_deviation"].item() for p in second.passes(1)
    ]
    assert max(deviations[8:]) == 0.0, "the fresh half"
    assert max(deviations[:8]) > 1e-4, "the half that another policy made"
    assert algorithm.ratio_limit(2) is None, "the second round holds transitions of another policy"
    assert DPOK().ratio_limit(2) is not None
    assert algorithm.ratio_limit(1) == 0.01, (
        "which the loop holds the first round to, when all is fresh"
    )


@pytest.mark.parametrize("records", [({"n": 1}, {}), ({}, {})])
def test_replayed_prompts_keep_their_records_through_a_checkpoint(records: tuple) -> None:
    """And plain prompts are written as they were before there were records."""
    memory = Memory()
    scored = []
    for i, one in enumerate(scored_of(ToyPolicy(), PLAN)):
        unit = with_prompts(one.unit, [Prompt(text, records[i]) for text in one.unit.prompts])
        assert one.trajectory is not None
        scored.append(replace(one, unit=unit, trajectory=replace(one.trajectory, unit=unit)))
    DPOK(replay=1).make_batch(scored, memory)
    [facts] = memory.facts()["earlier"]
    assert ["records" in one for one in facts] == [bool(record) for record in records]
    again = Memory()
    again.load(json.loads(json.dumps(memory.facts())), memory.tensors())
    joined = DPOK(replay=1).make_batch(scored_of(ToyPolicy(), PLAN), again)
    assert [dict(record_of(u.prompts[-1])) for u in joined.units[:2]] == list(records)
    assert joined.units[:2] == tuple(one.unit for one in scored)
