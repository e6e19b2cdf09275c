"""Sampling Demon against the sheet of one-step gains and against its own full run on a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.diffusion.paths import RectifiedFlow, VariancePreserving
from rlalign.samplers.demon import Demon, combine, demon_weights
from tests.samplers.helpers import GaussianPolicy, engine_of, unit_of

TABLE = {
    "tanh": {2: 0.80, 4: 1.58, 8: 2.50, 16: 3.70, 32: 5.36, 64: 7.64},
    "boltzmann": {2: 0.42, 4: 0.93, 8: 1.56, 16: 2.36, 32: 3.45, 64: 4.92},
    "sign": {2: 0.80, 4: 1.38, 8: 2.10, 16: 3.09, 32: 4.45, 64: 6.33},
    "linear": {2: 0.80, 4: 1.60, 8: 2.54, 16: 3.80, 32: 5.53, 64: 7.90},
}
"""Standard deviations that one step moves along a linear reward in 16,384 dimensions, tau the
standard deviation."""


def _gains(count: int, groups: int, size: int = 16384) -> dict[str, float]:
    """Mean movement along the reward's direction, which is the first coordinate."""
    torch.manual_seed(0)
    z = torch.randn(groups * count, size)
    reward_BK = z[:, 0].double().numpy().reshape(groups, count)
    tau = reward_BK.std(axis=1, ddof=1, keepdims=True)
    cases = {
        "tanh": demon_weights(reward_BK, tau, "tanh"),
        "boltzmann": demon_weights(reward_BK, tau, "boltzmann"),
        "sign": demon_weights(reward_BK, 1e-12 * tau, "tanh"),
        "linear": demon_weights(reward_BK, tau, "linear"),
        "best": demon_weights(reward_BK, 1e-9 * tau, "boltzmann"),
    }
    return {name: float(combine(z, w)[:, 0].mean()) for name, w in cases.items()}


@pytest.mark.parametrize("count", [2, 4, 8, 16, 32, 64])
def test_one_step_moves_as_far_as_the_table_says(count: int) -> None:
    """Seed 0, 160 groups (48 from 16 candidates on): the standard deviation of one movement is
    below 1 (0.8 at 2 candidates, about 0.6 at 64), so four standard errors are 0.32 and 0.4 at
    most; neighbours in the table are further apart."""
    found = _gains(count, 160 if count < 16 else 48)
    margin = 0.32 if count < 16 else 0.4
    for name, row in TABLE.items():
        assert found[name] == pytest.approx(row[count], abs=margin), name
    largest = {
        2: 0.565,
        4: 1.03,
        8: 1.42,
        16: 1.76,
        32: 2.07,
        64: 2.34,
    }  # Boltzmann at temperature 0 is best-of-K
    assert found["best"] == pytest.approx(largest[count], abs=margin)


def test_weights_are_invariant_and_equal_rewards_keep_the_plain_noise() -> None:
    reward_BK = np.array([[0.1, 0.9, 0.4], [2.0, -1.0, 0.5]])
    tau = reward_BK.std(axis=1, ddof=1, keepdims=True)
    for kind in ("tanh", "boltzmann"):
        base = demon_weights(reward_BK, tau, kind)
        np.testing.assert_allclose(demon_weights(reward_BK + 7.0, tau, kind), base, atol=1e-12)
        np.testing.assert_allclose(
            demon_weights(3.0 * reward_BK, 3.0 * tau, kind), base, atol=1e-12
        )
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    same = demon_weights(np.full((2, 3), 0.7), np.zeros((2, 1)), "tanh")
    assert torch.equal(combine(z, same), z[[0, 3]])


def test_a_missing_reward_has_no_weight_and_the_norm_is_that_of_noise() -> None:
    w = demon_weights(np.array([[0.1, np.nan, 0.4, 0.9]]), np.array([[0.3]]), "boltzmann")
    assert w[0, 1] == 0.0
    assert w.sum() == pytest.approx(1.0)
    z = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert float(combine(z, w).norm()) == pytest.approx(10.0, abs=1e-4)


class Karras:
    """The paper's grid of 64 noise levels on a path that keeps x at unit variance: sigma / alpha is
    the level."""

    train_steps, level_gap = 1000, 1e-3

    def at(self, plan: Plan) -> Karras:
        return self

    def levels(self, steps: int) -> torch.Tensor:
        low, high = 2e-3 ** (1 / 7), 14.648 ** (1 / 7)
        return (high + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (low - high)) ** 7

    def alpha(self, level: torch.Tensor) -> torch.Tensor:
        return 1.0 / (1.0 + level**2).sqrt()

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        return level / (1.0 + level**2).sqrt()

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level

    def random_levels(self, uniform_B: np.ndarray) -> torch.Tensor:
        raise NotImplementedError


def _full_run(candidates: int, weights: str, count: int) -> tuple[float, float, float]:
    """(mean, its standard error, norm) of the rewarded number after the paper's full run in 64
    dimensions."""
    policy = GaussianPolicy(Karras(), size=64)
    method = Demon(candidates=candidates, weights=weights, beta=0.1, stop=0.11)
    x = method.sample(
        engine_of(policy, lambda x_BD: x_BD[:, 0]), unit_of(count, Plan(steps=63))
    ).latents.flatten(1)
    return (
        float(x[:, 0].mean()),
        float(x[:, 0].std()) / math.sqrt(count),
        float(x.norm(dim=1).mean()),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidates", "weights", "mean"),
    [(2, "tanh", 4.48), (4, "tanh", 8.73), (4, "boltzmann", 5.20)],
)
def test_the_full_run_comes_to_the_known_reward(candidates: int, weights: str, mean: float) -> None:
    """Seed 0, 120 samples; four standard errors, plus 0.25 for the grid's last level."""
    found, error, norm = _full_run(candidates, weights, 120)
    assert found == pytest.approx(mean, abs=4 * error + 0.25)
    assert norm > 8.0  # correlated steps leave the shell of noise: the price


def test_adaptive_temperature_follows_every_step_unless_it_is_frozen() -> None:
    """On the flow path's SDE the spread of rewards changes from step to step; frozen at the first
    it is another run."""
    plan, policy = Plan(steps=8, rule="flow_sde", eta=0.7), GaussianPolicy(RectifiedFlow(), size=4)
    runs = {
        kind: Demon(candidates=4, temperature=kind)
        .sample(engine_of(policy, lambda x_BD: x_BD[:, 0] ** 3), unit_of(4, plan))
        .latents
        for kind in ("adaptive", "first")
    }
    assert not torch.allclose(runs["adaptive"], runs["first"])
    assert float(runs["adaptive"][:, 0].mean()) > 0.5


def test_calls_are_counted_as_promised() -> None:
    plan = Plan(steps=6, eta=1.0)
    policy = GaussianPolicy(VariancePreserving.scaled_linear(), size=2)
    for method in (
        Demon(candidates=3),
        Demon(candidates=3, look_ahead=3),
        Demon(candidates=2, beta=0.1),
    ):
        engine = engine_of(policy, lambda x_BD: x_BD[:, 0])
        method.sample(engine, unit_of(2, plan))
        # Stable Diffusion's path ends at a small noise, so its last step is noisy too: the promise
        # is an upper bound but one
        assert engine.cost.denoiser_calls <= 2 * (method.looks(plan) + 1)
        assert engine.cost.denoiser_calls >= 2 * method.looks(plan) * 0.8
