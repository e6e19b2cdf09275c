"""GRPO: advantages within the group, Flow-GRPO's coded KL, GRPO-Guard's centred ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.grpo import GRPO, time_steps
from rlalign.core.batches import StepPass
from rlalign.core.records import Plan
from rlalign.diffusion.rollout import replay
from tests.algorithms.helpers import FlowToy, in_float64, numeric_gradient, scored_of
from tests.algorithms.test_dpok import moved
from tests.toy import ToyPolicy, gradient

PLAN = Plan(steps=5, rule="flow_sde", eta=0.7)


@pytest.mark.parametrize("guard", [False, True])
def test_the_gradient_is_that_of_finite_differences(guard: bool) -> None:
    policy = FlowToy(dtype=torch.float64)
    algorithm = GRPO(clip_range=0.2, kl_weight=0.3, guard=guard)
    one = in_float64(next(iter(algorithm.make_batch(scored_of(policy, PLAN), Memory()).passes(3))))
    moved(policy, 1e-3)  # away from the kink of the clip at ratio 1 and of the KL at 0
    found = gradient(algorithm.loss(one, policy).value, policy)
    differences = numeric_gradient(lambda: algorithm.loss(one, policy).value, policy)
    assert differences.abs().max() > 1e-4
    assert torch.allclose(found, differences, rtol=1e-4, atol=1e-7)


def own_loss(policy: ToyPolicy, away: ToyPolicy, one: StepPass, guidance: float) -> torch.Tensor:
    """Flow-GRPO's loss of one step, written out; ``away`` answers for the empty caption."""
    (k,) = one.steps
    levels = policy.path.levels(one.unit.plan.steps)
    now, gap = float(levels[k]), float(levels[k + 1] - levels[k])
    x = one.before_BS[:, 0]
    asked = (x, torch.full((len(x),), 1000.0 * now, dtype=x.dtype))
    condition = policy.encode(one.unit.prompts)
    cond = policy.family.predict(*asked, condition.caption)
    uncond = away.family.predict(*asked, condition.empty)
    velocity = uncond + guidance * (cond - uncond)

    # the step of arXiv:2505.05470, eq. 9
    g2 = one.unit.plan.eta**2 * now / (1 - now)
    mean = x * (1 + g2 / (2 * now) * gap) + velocity * (1 + g2 * (1 - now) / (2 * now)) * gap
    variance = -g2 * gap
    log_prob = -((one.after_BS[:, 0] - mean) ** 2).flatten(1).mean(1) / (2 * variance)
    log_prob = log_prob - 0.5 * np.log(2 * np.pi * variance)
    ratio = torch.exp(log_prob - one.log_prob_BS[:, 0])
    return -(ratio * one.advantage_B).mean()


@pytest.mark.parametrize("detach_uncond", [False, True])
def test_the_gradient_through_guidance(detach_uncond: bool) -> None:
    """Through both halves, or through the caption's alone: finite differences of the loss written
    out, whose unconditional half has weights of its own where it is detached."""
    plan = PLAN.model_copy(update={"guidance": 4.5})
    policy = FlowToy(dtype=torch.float64)
    algorithm = GRPO(clip_range=0.9, skip_last=1, detach_uncond=detach_uncond)
    one = in_float64(list(algorithm.make_batch(scored_of(policy, plan), Memory()).passes(1))[2])
    assert one.steps[0] > 0
    moved(policy, 1e-3)
    away = moved(FlowToy(dtype=torch.float64), 1e-3) if detach_uncond else policy

    loss = algorithm.loss(one, policy)
    assert loss.means["ratio/clip_fraction"].item() == 0.0
    assert loss.value.item() == pytest.approx(own_loss(policy, away, one, 4.5).item(), rel=1e-9)
    found = gradient(loss.value, policy)
    differences = numeric_gradient(lambda: own_loss(policy, away, one, 4.5), policy)
    assert differences.abs().max() > 1e-3
    assert torch.allclose(found, differences, rtol=1e-4, atol=1e-7)


def test_what_detaching_changes() -> None:
    """The gradient, by much; nothing else, and nothing without guidance."""
    for guidance, alike in ((4.5, False), (1.0, True)):
        plan = PLAN.model_copy(update={"guidance": guidance})
        policy = FlowToy(seed=3)
        one = next(iter(GRPO().make_batch(scored_of(policy, plan), Memory()).passes(2)))
        both = GRPO().loss(one, policy)
        caption = GRPO(detach_uncond=True).loss(one, policy)
        assert torch.equal(both.value, caption.value)
        assert {**both.means, **both.maxima} == {**caption.means, **caption.maxima}
        first, second = gradient(both.value, policy), gradient(caption.value, policy)
        assert torch.equal(first, second) == alike
        cosine = torch.cosine_similarity(first, second, dim=0).item()
        assert (cosine > 0.999) == alike, cosine


def test_the_coded_kl_is_the_exact_one_times_the_level_distance() -> None:
    """O8: Flow-GRPO's value is KL / D * |gap| (per element it is KL * |gap|)."""
    policy = moved(FlowToy(dtype=torch.float64))
    scored = scored_of(policy, PLAN)
    for one in GRPO().make_batch(scored, Memory()).passes(1):
        one = in_float64(one)
        one = type(one)(**{**vars(one), "advantage_B": torch.zeros_like(one.advantage_B)})
        exact = GRPO(kl_weight=1.0).loss(one, policy).value.item()
        coded = GRPO(kl_weight=1.0, kl_form="coded").loss(one, policy).value.item()
        levels = policy.path.levels(PLAN.steps)
        gap = float(levels[one.steps[0]] - levels[one.steps[0] + 1])
        assert coded == pytest.approx(exact * gap, rel=1e-9)


@pytest.mark.parametrize(("make", "plan"), [(FlowToy, PLAN), (ToyPolicy, Plan(steps=5))])
def test_the_coded_kl_divides_by_the_diffusion_per_unit_of_time(
    make: type[ToyPolicy], plan: Plan
) -> None:
    """|mean - mean_ref|^2 / (2 g^2), g^2 = std^2 / |dt|, dt of a path of length 1: on timesteps too
    (200 of 1000 are 0.2)."""
    policy = moved(make(dtype=torch.float64))
    levels = policy.path.levels(plan.steps)
    longest = 1000.0 if make is ToyPolicy else 1.0
    for one in GRPO().make_batch(scored_of(policy, plan), Memory()).passes(1):
        one = in_float64(one)
        one = type(one)(**{**vars(one), "advantage_B": torch.zeros_like(one.advantage_B)})
        (k,) = one.steps
        step = (levels[k] - levels[k + 1]) / longest
        assert 0 < step < 1
        with torch.no_grad():
            mine = replay(
                policy, one.unit, one.before_BS, one.steps, policy.encode(one.unit.prompts)
            ).gaussian
            with policy.as_reference():
                theirs = replay(
                    policy, one.unit, one.before_BS, one.steps, policy.encode(one.unit.prompts)
                ).gaussian
        wanted = ((mine.mean - theirs.mean) ** 2 / (2 * mine.std**2 / step)).mean()
        found = GRPO(kl_weight=1.0, kl_form="coded").loss(one, policy).value
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize(("make", "plan"), [(FlowToy, PLAN), (ToyPolicy, Plan(steps=5))])
def test_guard_divides_by_the_time_step(make: type[ToyPolicy], plan: Plan) -> None:
    """At ratio 1 each step's loss is -A / |dt|; five steps of a path of length 1 have a mean weight
    of at least 5."""
    policy = make(dtype=torch.float64)
    steps = time_steps(policy, plan)
    assert steps.sum().item() == pytest.approx(1.0, abs=0.2)
    values = []
    for one in (
        GRPO(guard=True, skip_last=0).make_batch(scored_of(policy, plan), Memory()).passes(1)
    ):
        one = in_float64(one)
        one = type(one)(**{**vars(one), "advantage_B": torch.ones_like(one.advantage_B)})
        values.append(-GRPO(guard=True).loss(one, policy).value.item())
        assert values[-1] == pytest.approx(1.0 / steps[one.steps[0]].item(), rel=1e-3), (
            "the ratio is 1 up to float32"
        )
    assert np.mean(values) >= 5.0


def test_o3_guard_centres_the_log_ratio() -> None:
    """Under the behaviour policy log r has mean -d^2 / (2 s^2) and std d / (s sqrt(D)); centred and
    scaled: 0 and d / sqrt(D).

    100 000 draws of D = 16 elements, seed 0; margins of 4 standard errors.
    """
    count, elements, std, shift = 100_000, 16, 0.3, 0.05
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((count, elements)))
    log_ratio = (-((std * z - shift) ** 2) / (2 * std**2) + z**2 / 2).mean(1)
    margin = 4 * shift / (std * np.sqrt(elements * count))
    assert log_ratio.mean().item() == pytest.approx(-(shift**2) / (2 * std**2), abs=margin)
    ratio = objectives.guarded_ratio(
        log_ratio, torch.full((count,), shift**2), torch.full((count,), std)
    )
    assert ratio.log().mean().item() == pytest.approx(0.0, abs=margin)
    assert ratio.log().std().item() == pytest.approx(shift / np.sqrt(elements), rel=0.02)


def test_two_groups_show_what_the_std_is_of() -> None:
    """Groups {0, 1} and {10, 30}: group std gives +-1 each, the round's std +-.04 and +-.83."""
    from rlalign.algorithms._advantages import within_groups

    reward_B = np.array([0.0, 1.0, 10.0, 30.0], dtype=np.float32)
    groups = [0, 0, 1, 1]
    assert within_groups(reward_B, groups, std="group", eps=0.0) == pytest.approx([-1, 1, -1, 1])
    assert within_groups(reward_B, groups, std="global", eps=0.0) == pytest.approx(
        [-0.041, 0.041, -0.828, 0.828], abs=2e-3
    )


def test_the_last_steps_are_left_out() -> None:
    policy = FlowToy()
    steps = {
        p.steps[0]
        for p in GRPO(skip_last=2).make_batch(scored_of(policy, PLAN), Memory()).passes(1)
    }
    assert steps == {0, 1, 2}
