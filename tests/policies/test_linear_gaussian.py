"""The linear-Gaussian planner against closed forms: its joint Gaussian, the smoother, a regulator,
and the tilt by a quadratic return."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.alignment.loop import train_local
from rlalign.config import load_run
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError, build
from rlalign.data.double_integrator import (
    A_22,
    B_2,
    CAUTION,
    COST,
    follow,
    joint_gaussian,
    read_states,
    regulate,
    state_prompt,
)
from rlalign.data.prompts.states import States
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import denoised, rollout, schedule_of
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.policies.base import Policy
from rlalign.policies.linear_gaussian import LinearGaussian
from rlalign.samplers.fk_steering import FkSteering
from tests.runs import CONFIGS, quiet

H = 8
START, GOAL = (1.5, -0.5), (-0.5, 0.25)
PROMPTS = {False: state_prompt(START), True: state_prompt(START, GOAL)}
Moments = tuple[torch.Tensor, torch.Tensor]
"""(D,) mean and (D, D) covariance."""


@functools.cache
def policy() -> Policy:
    return LinearGaussian(horizon=H).load("cpu")


def moments(to_goal: bool, horizon: int = H) -> Moments:
    """Of the base controller's plans from START (to GOAL)."""
    joint = joint_gaussian(horizon, to_goal=to_goal)
    states = [*START, *GOAL] if to_goal else [*START]
    return torch.from_numpy(joint.map_DN @ states), torch.from_numpy(joint.covariance_DD)


def unit_of(prompt: str, plan: Plan, count: int = 1) -> Unit:
    rows = [(7, prompt, sample) for sample in range(count)]
    return Unit.of_rows(UnitKey("train", 1, 0), rows, 0, plan)


def moments_of_chain(
    prompt: str, plan: Plan, start: Moments, twist: Moments | None = None
) -> Moments:
    """Of what a plan's chain ends in, begun at ``start`` noised to the first level: every step is
    linear and Gaussian, so it is probed with zero and each basis vector. ``twist`` is the log of a
    Gaussian-shaped weight (its linear term and its matrix) whose exact guidance the noise
    prediction leans by."""
    exact = policy().in_precision(torch.float64)
    unit = unit_of(prompt, plan, 3 * H + 1)
    schedule = schedule_of(exact.path, unit)
    condition = exact.encode(unit.prompts, plan)
    probes = torch.cat([torch.zeros(1, 3 * H), torch.eye(3 * H)]).double()
    alpha, sigma = (float(f(schedule.levels[0])) for f in (exact.path.alpha, exact.path.sigma))
    mean, cov = alpha * start[0], alpha**2 * start[1] + sigma**2 * torch.eye(3 * H)
    prior = moments("goal" in prompt.record)  # type: ignore[attr-defined]

    def ask(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        level = schedule.levels[k]
        with torch.no_grad():
            gaussian = denoised(
                Leaning(exact, prior, twist) if twist is not None else exact,
                x.reshape(-1, 3, H),
                level,
                schedule.levels[k + 1],
                condition,
                plan,
                schedule.eta_K[k],
            ).gaussian
        return gaussian.mean.flatten(1), gaussian.std

    for k in range(plan.steps):
        found, std = ask(probes, k)
        slope = (found[1:] - found[0]).T
        mean = found[0] + slope @ mean
        cov = slope @ cov @ slope.T + std**2 * torch.eye(3 * H)
    return mean, cov


class Leaning:
    """A policy whose noise leans by -sigma d/dx log E[weight(clean) | x], of a weight
    exp(linear . clean + clean matrix clean / 2)."""

    def __init__(self, inner: Policy, prior: Moments, twist: Moments) -> None:
        self._inner, self._prior, self._twist = inner, prior, twist
        self.path, self.device = inner.path, inner.device
        self.encode, self.decode, self.latent_shape = inner.encode, inner.decode, inner.latent_shape

    def denoise(self, x, level, condition, guidance):
        _, noise = self._inner.denoise(x, level, condition, guidance)
        alpha, sigma = (float(one) for one in coefficients(self.path, level, x))
        mean, cov = self._prior
        linear, matrix = self._twist
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(mean)))
        left = cov - alpha * gain @ cov

        def log_weight(x_BD: torch.Tensor) -> torch.Tensor:
            about = mean + (x_BD - alpha * mean) @ gain.T
            shape = torch.linalg.inv(torch.eye(len(mean)) - left @ matrix)
            push = linear + about @ matrix.T
            return (
                about @ linear
                + ((about @ matrix) * about).sum(1) / 2
                + (push * (push @ (shape @ left).T)).sum(1) / 2
            )

        with torch.enable_grad():
            x_BD = x.flatten(1).detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_weight(x_BD).sum(), x_BD)
        noise = noise - sigma * slope.reshape(x.shape)
        return (x - sigma * noise) / alpha, noise


@pytest.mark.parametrize("to_goal", [False, True])
@pytest.mark.parametrize("level", [0, 250, 999])
def test_the_prediction_is_minus_sigma_times_the_score(to_goal: bool, level: int) -> None:
    exact = policy().in_precision(torch.float64)
    alpha, sigma = (float(f(torch.tensor(level))) for f in (exact.path.alpha, exact.path.sigma))
    mean, cov = moments(to_goal)
    noised = torch.distributions.MultivariateNormal(
        alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(3 * H)
    )
    x = torch.randn(8, 3, H, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(noised.log_prob(x.flatten(1)).sum(), x)
    words = exact.encode([PROMPTS[to_goal]] * 8).caption
    with torch.no_grad():
        found = exact.family.predict(x, torch.full((8,), level), words)
    torch.testing.assert_close(found, -sigma * score, rtol=1e-6, atol=1e-6)


def moments_of_fine_chains(
    prompt: str, eta: float, start: Moments, twist: Moments | None = None
) -> Moments:
    """Of 250 and 500 steps, without the error that is proportional to the step's length."""
    coarse, fine = (
        moments_of_chain(prompt, Plan(steps=steps, eta=eta), start, twist) for steps in (250, 500)
    )
    return 2.0 * fine[0] - coarse[0], 2.0 * fine[1] - coarse[1]


@pytest.mark.parametrize(
    ("eta", "to_goal", "margin"),
    [
        (0.0, True, 1e-3),
        pytest.param(0.0, False, 1e-3, marks=pytest.mark.slow),
        pytest.param(1.0, False, 4e-3, marks=pytest.mark.slow),
    ],
)
def test_the_chain_ends_in_the_joint_gaussian(eta: float, to_goal: bool, margin: float) -> None:
    """Mean and covariance, exactly propagated; held numbers have no variance."""
    wanted_mean, wanted_cov = moments(to_goal)
    mean, cov = moments_of_fine_chains(PROMPTS[to_goal], eta, (wanted_mean, wanted_cov))
    torch.testing.assert_close(mean, wanted_mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(cov, wanted_cov, rtol=0, atol=margin)
    held = torch.from_numpy(joint_gaussian(H, to_goal=to_goal).held_D)
    assert cov.diagonal()[held].abs().max() < 1e-12


def test_held_ends_give_the_smoothers_mean() -> None:
    """The likeliest noise that leads from the start to the goal, by least squares, run forward."""
    gains_H2 = regulate(H, (*COST[:2], CAUTION))
    ends_H2 = np.zeros((H, 2))
    for moment in range(H):
        one = np.zeros((1, H))
        one[0, moment] = 1.0
        ends_H2[moment] = follow(gains_H2, np.zeros((1, 2)), one)[0, :2, -1]
    drift_2 = follow(gains_H2, np.array([START]), np.zeros((1, H)))[0, :2, -1]
    noise_H = np.linalg.lstsq(ends_H2.T, np.array(GOAL) - drift_2, rcond=None)[0]
    smoothed_3H = follow(gains_H2, np.array([START]), noise_H[None])[0]
    assert smoothed_3H[:2, -1] == pytest.approx(GOAL)
    mean, _ = moments(True)
    assert mean.numpy() == pytest.approx(smoothed_3H.reshape(-1), abs=1e-9)


@torch.no_grad()
def test_samples_end_on_the_held_states_whatever_the_network_says() -> None:
    """400 samples, seed 0: means within 4 standard errors and 0.01, and the ends to rounding
    errors; with a trained network the ends stay, and the dynamics too."""
    plan = Plan(steps=20, eta=1.0)
    latents = rollout(policy(), unit_of(PROMPTS[True], plan, 400), 0)[0].latents_BK1[:, -1]
    mean, cov = moments(True)
    error = 4.0 * np.sqrt(cov.diagonal().numpy() / 400) + 0.01
    assert (np.abs(latents.reshape(400, -1).mean(0) - mean.numpy()) < error).all()
    trained = LinearGaussian(horizon=H).load("cpu")
    for parameter in trained.trainable().values():
        parameter.add_(0.1)
    moved = rollout(trained, unit_of(PROMPTS[True], plan, 64), 0)[0].latents_BK1[:, -1]
    assert np.abs(moved - latents[:64]).max() > 0.01
    for found in (latents, moved):
        states, controls = found[:, :2].transpose(0, 2, 1), found[:, 2, :-1]
        after = states[:, :-1] @ A_22.T + controls[..., None] * B_2
        assert np.abs(states[:, 1:] - after).max() < 1e-4, "the dynamics are kept"
        assert found[:, :2, 0] == pytest.approx(np.tile(START, (len(found), 1)), abs=1e-5)
        assert found[:, :2, -1] == pytest.approx(np.tile(GOAL, (len(found), 1)), abs=1e-5)


def tilted(prior: Moments, strength: float) -> tuple[Moments, Moments]:
    """(the weight exp(-strength cost) as a twist, the tilted Gaussian in closed form)."""
    mean, cov = prior
    matrix = -2.0 * strength * torch.diag(torch.tensor(COST).double().repeat_interleave(H))
    shape = torch.linalg.inv(torch.eye(len(mean)) - cov @ matrix)
    return (torch.zeros_like(mean), matrix), (shape @ mean, shape @ cov)


@pytest.mark.parametrize("to_goal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_value_guidance_with_a_quadratic_return_is_the_gaussian_tilt(to_goal: bool) -> None:
    """Guided by the gradient of its exact value, exactly propagated: mean and covariance."""
    twist, (mean, cov) = tilted(moments(to_goal), 0.5)
    found_mean, found_cov = moments_of_fine_chains(PROMPTS[to_goal], 0.0, (mean, cov), twist)
    torch.testing.assert_close(found_mean, mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(found_cov, cov, rtol=0, atol=1e-3)
    assert (mean - moments(to_goal)[0]).abs().max() > 0.05, "it moves"


def test_fk_steering_finds_the_mean_of_the_tilt() -> None:
    """Weighted by exp(strength * reward): the mean of 1,000 particles, seed 0, within 0.1; that of
    plain samples is 0.2 away."""
    _, (mean, _) = tilted(moments(False), 1.0)
    reward = build("rewards", {"name": "quadratic", "weights": COST})
    engine = LocalEngine(policy(), [LiveRewards([reward])], rows=1000, parallel=False)  # type: ignore[list-item]
    method = FkSteering(particles=1000, strength=1.0, keep="weighted")
    swarm = method.run(engine, unit_of(PROMPTS[False], Plan(steps=20)))
    weight_N = torch.from_numpy(swarm.weights_BN[0])
    found = (weight_N[:, None] * swarm.x.flatten(1).double()).sum(0)
    assert (found - mean).abs().max() < 0.1
    assert (moments(False)[0] - mean).abs().max() > 0.2


def test_the_regulator_is_the_best_of_all_controls() -> None:
    """Its cost is the least over all controls, which least squares finds."""
    zero = np.zeros((1, H))
    best = follow(regulate(H), np.array([START]), zero)
    scale = np.sqrt(np.array(COST))[:, None]
    no_gains = np.zeros((H, 2))
    drift = (scale * follow(no_gains, np.array([START]), zero)[0]).reshape(-1)
    effects = [
        (scale * follow(no_gains, np.zeros((1, 2)), one[None])[0]).reshape(-1) for one in np.eye(H)
    ]
    control_H = np.linalg.lstsq(np.stack(effects, axis=1), -drift, rcond=None)[0]
    assert best[0, 2] == pytest.approx(control_H, abs=1e-9)
    assert best[0, :2, 1] == pytest.approx(A_22 @ START + B_2 * control_H[0])


def test_what_a_prompt_lacks_is_said() -> None:
    with pytest.raises(UserError, match=r"a prompt must have a record with a start"):
        policy().encode(["from here"])
    with pytest.raises(UserError, match=r"the start of a prompt must be two numbers"):
        read_states(state_prompt((1.0, 2.0), (0.0, 0.0)).__class__("x", {"start": [1.0]}))
    with pytest.raises(UserError, match="give it latents"):
        policy().encode_media(torch.zeros(1, 1, 3, 32, 32))


def test_it_saves_and_reads_what_was_trained(tmp_path: Path) -> None:
    trained = LinearGaussian(horizon=H, lora_rank=2).load("cpu")
    with torch.no_grad():
        for parameter in trained.trainable().values():
            parameter.add_(0.3)
    trained.save(tmp_path)
    again = LinearGaussian(horizon=H, path=str(tmp_path)).load("cpu")
    x, words = torch.randn(2, 3, H), trained.encode([PROMPTS[False], PROMPTS[True]]).caption
    with torch.no_grad():
        found, wanted = (p.answer(x, torch.tensor([100, 900]), words) for p in (again, trained))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="with this horizon and"):
        LinearGaussian(horizon=4, path=str(tmp_path)).load("cpu")
    media = policy().decode(torch.zeros(2, 3, H))
    assert media.shape == (2, 1, 3, 32, 32)
    assert media[0, 0, 0].argmax(0).tolist() == [15] * 32


def cost_of(plans: np.ndarray) -> float:
    return float((np.array(COST)[:, None] * plans**2).sum((1, 2)).mean())


@pytest.mark.slow
def test_an_aligned_planner_costs_what_the_regulator_does(tmp_path: Path) -> None:
    """Within 5 % on held-out starts, from a third as much again."""
    run = load_run(CONFIGS / "plan_linear_gaussian.yaml")
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    starts = [p.record["start"] for _, p in States().held_out(run.evaluate.prompts)]  # type: ignore[attr-defined]
    best = cost_of(follow(regulate(H), np.array(starts), np.zeros((len(starts), H))))
    base, aligned = (-final[which]["reward/quadratic/mean"] for which in ("base", "aligned"))
    assert base > 1.3 * best
    assert best * (1.0 - 1e-6) < aligned < 1.05 * best
