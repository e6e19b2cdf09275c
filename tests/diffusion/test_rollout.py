"""Trajectories and their replay, on a small denoiser written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.algorithms.base import step_batch
from rlalign.core.records import Plan, Scored, Unit, UnitKey
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import NoisePath, RectifiedFlow, VariancePreserving, coefficients
from rlalign.diffusion.predictions import PredictionType, to_clean_and_noise
from rlalign.diffusion.rollout import (
    advance,
    moves,
    replay,
    replay_log_prob,
    rollout,
    schedule_of,
)

PROMPTS = ("a red circle", "a blue square", "a blue square", "two crosses")


class Denoiser:
    """A two-layer network on latents (2, 4, 4), conditioned on a prompt's length and the
    timestep."""

    device = "cpu"

    def __init__(self, path: NoisePath, kind: PredictionType = "epsilon") -> None:
        self.path, self.kind = path, kind
        torch.manual_seed(5)
        self.network = torch.nn.Sequential(
            torch.nn.Linear(34, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32)
        )

    def encode(self, prompts: Sequence[str], plan: Plan | None = None) -> torch.Tensor:
        return torch.tensor([[len(p) / 20.0] for p in prompts])

    def denoise(self, x, level, condition, guidance):
        timestep = (self.path.timestep(level).to(x) / 1000.0).expand(len(x))[:, None]
        prediction = self.network(
            torch.cat([x.flatten(1), timestep, condition.to(x)], dim=1)
        ).reshape(x.shape)
        alpha, sigma = coefficients(self.path, level, x)
        return to_clean_and_noise(guidance * prediction, x, alpha, sigma, self.kind)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 1, 3, 4, 4): two channels and their mean, some of it outside [0, 1]."""
        return torch.cat([latents, latents.mean(1, keepdim=True)], dim=1)[:, None] * 0.5 + 0.5

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (2, 4, 4)


CLEAN_END = VariancePreserving.scaled_linear(ends_clean=True)
CASES = [
    (VariancePreserving.scaled_linear(), "epsilon", Plan(steps=6, eta=1.0)),
    (CLEAN_END, "epsilon", Plan(steps=6, eta=0.5, guidance=1.3)),
    (CLEAN_END, "v_prediction", Plan(steps=6, rule="ddpm")),
    (RectifiedFlow(shift=3.0), "flow", Plan(steps=6, rule="flow_sde", eta=0.7)),
    (RectifiedFlow(), "flow", Plan(steps=6, rule="ddim", eta=1.0)),
]
ids = [f"{type(path).__name__}-{kind}-{plan.rule}-{plan.eta}" for path, kind, plan in CASES]


def unit_of(plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("train", 2, 0),
        prompts=PROMPTS,
        prompt_ids=(1, 2, 2, 3),
        sample_ids=(0, 0, 1, 0),
        seed=4,
        plan=plan,
    )


def stored(trajectory) -> torch.Tensor:
    return torch.from_numpy(trajectory.latents_BK1.astype(np.float32))


@pytest.mark.parametrize(("path", "kind", "plan"), CASES, ids=ids)
def test_shapes_and_types(path, kind, plan):
    trajectory, media = rollout(Denoiser(path, kind), unit_of(plan), 3)
    assert trajectory.latents_BK1.shape == (4, 7, 2, 4, 4)
    assert trajectory.latents_BK1.dtype == np.float32
    assert trajectory.log_prob_BK.shape == (4, 6)
    assert trajectory.log_prob_BK.dtype == np.float32
    assert trajectory.stochastic_K.shape == (6,)
    assert trajectory.stochastic_K.dtype == np.bool_
    assert trajectory.policy_version == 3
    assert media.shape == (4, 1, 3, 4, 4)
    assert media.dtype == np.uint8


@pytest.mark.parametrize(("path", "kind", "plan"), CASES, ids=ids)
def test_one_step_at_a_time_gives_the_stored_log_prob_bit_for_bit(path, kind, plan):
    """The ratio before the first update is exactly 1."""
    policy, unit = Denoiser(path, kind), unit_of(plan)
    trajectory, _ = rollout(policy, unit, 0)
    assert trajectory.latents_BK1.dtype == np.float32
    for k in range(plan.steps):
        log_prob, _ = replay_log_prob(
            policy, unit, *moves(stored(trajectory), [k]), [k], policy.encode(unit.prompts)
        )
        expected = torch.from_numpy(trajectory.log_prob_BK[:, k : k + 1])
        assert torch.equal(log_prob, expected)
        assert (torch.exp(log_prob - expected) == 1).all()


def test_rounding_after_the_log_prob_would_move_it():
    """Why latents are stored in float32: the same chain, rounded to float16 for storage alone, is
    off by more than 1e-5."""
    policy, unit = Denoiser(VariancePreserving.scaled_linear()), unit_of(Plan(steps=6))
    trajectory, _ = rollout(policy, unit, 0)
    rounded = torch.from_numpy(trajectory.latents_BK1.astype(np.float16).astype(np.float32))
    log_prob, _ = replay_log_prob(
        policy, unit, *moves(rounded, [5]), [5], policy.encode(unit.prompts)
    )
    assert (log_prob - torch.from_numpy(trajectory.log_prob_BK[:, 5:])).abs().max() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_keeps_its_own_latents_and_the_last(window):
    """Those that its steps start from and go to, bit for bit those of a chain that keeps all; the
    log-prob at each of its steps is the stored one."""
    path = RectifiedFlow(shift=3.0)
    plan = Plan(steps=8, rule="flow_sde", eta=0.7, window=window)
    policy, unit = Denoiser(path, "flow"), unit_of(plan)
    trajectory, _ = rollout(policy, unit, 0)
    steps = np.flatnonzero(trajectory.stochastic_K).tolist()
    assert len(steps) == window
    assert trajectory.kept == (*range(steps[0], steps[-1] + 2), 8)
    assert trajectory.latents_BK1.shape == (4, window + 2, 2, 4, 4)

    # the whole chain, one step after the other
    schedule = schedule_of(path, unit)
    condition = policy.encode(unit.prompts)
    chain = [unit_noise(unit, 0, (2, 4, 4))]
    for k in range(8):
        chain.append(advance(policy, unit, schedule, k, chain[-1], condition)[1])
    wanted = torch.stack(chain, dim=1)[:, list(trajectory.kept)]
    assert np.array_equal(trajectory.latents_BK1, wanted.numpy())

    # replayed out of a batch, with a step left out and without
    scored = Scored(
        unit=unit,
        policy_version=0,
        raw={},
        total_B=np.zeros(4, dtype=np.float32),
        trajectory=trajectory,
    )
    batch = step_batch([scored], np.zeros(4))
    assert batch.latents[0].shape[1] == window + 1
    for one in batch.passes(1):
        moved = (one.before_BS, one.after_BS, one.steps, condition)
        assert torch.equal(replay_log_prob(policy, unit, *moved)[0], one.log_prob_BS)
    if window > 1:
        left = step_batch([scored], np.zeros(4), skip_last=8 - steps[-1])
        assert [one.steps for one in left.passes(1)] == [(k,) for k in steps[:-1]]
        assert left.latents[0].shape[1] == window
        assert torch.equal(left.latents[0], batch.latents[0][:, :-1])

    # a batch that a checkpoint of before has kept whole
    whole = replace(batch, latents=(torch.stack(chain, dim=1),))
    for one, other in zip(batch.passes(2), whole.passes(2), strict=True):
        assert torch.equal(one.before_BS, other.before_BS)
        assert torch.equal(one.after_BS, other.after_BS)


@pytest.mark.parametrize("steps", [[0, 1, 2, 3, 4, 5], [4, 1], [5, 5]])
@pytest.mark.parametrize(("path", "kind", "plan"), CASES, ids=ids)
def test_many_steps_in_a_pass_agree(path, kind, plan, steps):
    """Other matrix shapes round differently: margin 1e-6 per nat, and 1e-5 on the means."""
    policy, unit = Denoiser(path, kind), unit_of(plan)
    trajectory, _ = rollout(policy, unit, 0)
    latents, condition = stored(trajectory), policy.encode(unit.prompts)
    log_prob, (gaussian, _, _) = replay_log_prob(
        policy, unit, *moves(latents, steps), steps, condition.repeat(len(steps), 1)
    )
    expected = torch.from_numpy(trajectory.log_prob_BK[:, steps])
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)
    assert gaussian.mean.shape == (4 * len(steps), 2, 4, 4)
    for s, k in enumerate(steps):
        alone = replay(policy, unit, latents[:, [k]], [k], condition).gaussian
        torch.testing.assert_close(gaussian.mean[4 * s : 4 * s + 4], alone.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            gaussian.std[4 * s].squeeze(), alone.std.squeeze(), rtol=0, atol=0
        )


@pytest.mark.parametrize(("path", "kind", "plan"), CASES, ids=ids)
def test_the_chain_is_its_gaussians_and_the_keyed_noise(path, kind, plan):
    policy, unit = Denoiser(path, kind), unit_of(plan)
    trajectory, _ = rollout(policy, unit, 0)
    latents = stored(trajectory)
    assert torch.equal(latents[:, 0], unit_noise(unit, 0, (2, 4, 4)))
    with torch.no_grad():
        for k in range(plan.steps):
            gaussian = replay(
                policy, unit, latents[:, [k]], [k], policy.encode(unit.prompts)
            ).gaussian
            assert torch.equal(
                latents[:, k + 1], gaussian.sample(unit_noise(unit, k + 1, (2, 4, 4)))
            )


def test_a_deterministic_last_step_is_masked():
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6, eta=1.0))
    trajectory, _ = rollout(policy, unit, 0)
    assert trajectory.stochastic_K.tolist() == [True] * 5 + [False]
    assert (trajectory.log_prob_BK[:, 5] == 0).all()
    assert (trajectory.log_prob_BK[:, :5] != 0).all()
    steps = list(range(6))
    log_prob, _ = replay_log_prob(
        policy, unit, *moves(stored(trajectory), steps), steps, policy.encode(PROMPTS).repeat(6, 1)
    )
    grads = torch.autograd.grad(log_prob.sum(), list(policy.network.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)
    last, _ = replay_log_prob(
        policy, unit, *moves(stored(trajectory), [5]), [5], policy.encode(PROMPTS)
    )
    assert all(
        (g == 0).all() for g in torch.autograd.grad(last.sum(), list(policy.network.parameters()))
    )


def test_without_noise_nothing_has_a_density():
    trajectory, _ = rollout(Denoiser(CLEAN_END), unit_of(Plan(steps=6, eta=0.0)), 0)
    assert not trajectory.stochastic_K.any()
    assert (trajectory.log_prob_BK == 0).all()
    assert np.isfinite(trajectory.latents_BK1).all()


def test_the_same_unit_twice_is_the_same_bits_and_leaves_global_generators_alone():
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, media_one = rollout(policy, unit, 0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    two, media_two = rollout(policy, unit, 0)
    assert np.array_equal(one.latents_BK1, two.latents_BK1)
    assert np.array_equal(one.log_prob_BK, two.log_prob_BK)
    assert np.array_equal(media_one, media_two)


def test_other_weights_give_another_log_prob_with_a_gradient():
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6))
    trajectory, _ = rollout(policy, unit, 0)
    with torch.no_grad():
        policy.network[2].bias += 0.1
    log_prob, _ = replay_log_prob(
        policy, unit, *moves(stored(trajectory), [2]), [2], policy.encode(PROMPTS)
    )
    assert log_prob.requires_grad
    assert (log_prob.detach().numpy() < trajectory.log_prob_BK[:, 2:3]).any()
    assert not np.array_equal(log_prob.detach().numpy(), trajectory.log_prob_BK[:, 2:3])


def test_the_log_prob_gradient_by_finite_differences():
    """In float64, central differences of 1e-5 along one bias; margin 1e-6 relative."""
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6))
    trajectory, _ = rollout(policy, unit, 0)
    policy.network.double()
    latents, bias = stored(trajectory).double(), policy.network[2].bias

    def total() -> torch.Tensor:
        return replay_log_prob(policy, unit, *moves(latents, [2]), [2], policy.encode(PROMPTS))[
            0
        ].sum()

    (grad,) = torch.autograd.grad(total(), bias)
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            bias[3] += shift
            values.append(total().item())
            bias[3] -= shift
    assert grad[3].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_media_are_rounded_and_kept_in_range():
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6))
    trajectory, media = rollout(policy, unit, 0)
    pixels = policy.decode(stored(trajectory)[:, -1]).numpy()
    assert pixels.min() < 0 and pixels.max() > 1, (
        "the toy decodes out of range, so that this test says something"
    )
    assert np.array_equal(media, np.round(pixels.clip(0, 1) * 255).astype(np.uint8))


def test_a_samples_trajectory_does_not_depend_on_its_unit():
    """A sample moved to another unit keeps its noise; its latents agree up to the rounding of other
    matrix shapes."""
    policy, unit = Denoiser(CLEAN_END), unit_of(Plan(steps=6))
    whole, _ = rollout(policy, unit, 0)
    part = replace(
        unit,
        key=UnitKey("train", 2, 7),
        prompts=PROMPTS[2:],
        prompt_ids=unit.prompt_ids[2:],
        sample_ids=unit.sample_ids[2:],
    )
    alone, _ = rollout(policy, part, 0)
    assert np.array_equal(alone.latents_BK1[:, 0], whole.latents_BK1[2:, 0])
    np.testing.assert_allclose(alone.latents_BK1, whole.latents_BK1[2:], rtol=0, atol=2e-5)
