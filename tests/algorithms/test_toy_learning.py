"""O25: on a toy of two numbers every algorithm raises the reward, for each of four seeds, within a
stated KL to its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.d3po import D3PO
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.algorithms.diffusion_nft import DiffusionNFT
from rlalign.algorithms.dpok import DPOK
from rlalign.algorithms.grpo import GRPO
from rlalign.algorithms.reinforce import Reinforce
from rlalign.algorithms.reward_backprop import RewardBackprop
from rlalign.algorithms.rwr import RWR
from rlalign.core.batches import PromptBatch
from rlalign.core.records import Plan, Scored, Unit
from rlalign.learning.evaluate import kl_to_reference
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from tests.algorithms.helpers import FlowToy
from tests.toy import PROMPTS, MediaScorer, ToyPolicy, collect, make_units

SDE, FLOW = Plan(steps=5, eta=1.0), Plan(steps=5, rule="flow_sde", eta=0.7)

CASES: dict[str, tuple[Algorithm, type[ToyPolicy], Plan, dict[str, Any]]] = {
    "reinforce": (Reinforce(), ToyPolicy, SDE, {"updates_per_round": 1}),
    "ddpo": (DDPO(clip_range=0.1, advantage="global"), ToyPolicy, SDE, {}),
    "dpok": (DPOK(clip_range=0.1, advantage="global", kl_weight=0.2), ToyPolicy, SDE, {}),
    "grpo": (GRPO(clip_range=0.1), FlowToy, FLOW, {}),
    "grpo guard": (GRPO(clip_range=0.1, guard=True), FlowToy, FLOW, {}),
    "rwr": (RWR(temperature=0.2, draws=2), ToyPolicy, SDE, {}),
    "diffusion_dpo": (DiffusionDPO(beta=50.0, draws=8), ToyPolicy, SDE, {"lr": 3e-3}),
    "d3po": (D3PO(beta=5.0), ToyPolicy, SDE, {}),
    "diffusion_nft": (DiffusionNFT(draws=2, kl_weight=0.0), FlowToy, FLOW, {}),
    "draft": (RewardBackprop(last_steps=2), ToyPolicy, SDE, {}),
}
ROUNDS, UNITS, PER_UNIT = 12, 2, 32

BUDGETS = {"ddpo": 12.0, "dpok": 0.85, "rwr": 16.0, "diffusion_dpo": 10.0}
"""Largest KL to the reference after the last round, nats per step and element: half as much again
as the largest seen in seeds 0 to 3 (ddpo 5.97 to 7.86, dpok .39 to .56, rwr 4.49 to 10.76,
diffusion_dpo 4.47 to 6.69)."""


@MediaScorer
def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """The reward as a picture shows it, with gradients: how red it is."""
    red = media_BFCHW[:, 0, 0].mean((-1, -2))
    return {"red": red, "total": red}


def squeezed(final_BCHW: np.ndarray) -> np.ndarray:
    """(B,) the same from the final latent."""
    return 1.0 / (1.0 + np.exp(-final_BCHW.reshape(len(final_BCHW), -1)[:, 0]))


def looked_at(policy: ToyPolicy, units: Sequence[Unit]) -> list[Scored]:
    return collect(policy, units, reward=squeezed)


def pretrained(make: type[ToyPolicy], seed: int) -> ToyPolicy:
    """The toy after 400 updates of the denoising loss on two independent normals of std 0.7: a
    model of some data."""
    policy = make(seed=seed)
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=1e-2)
    rng = np.random.default_rng(seed)
    condition = policy.encode(PROMPTS * 32)
    for _ in range(400):
        clean, noise = (
            torch.from_numpy(rng.standard_normal((128, 2, 1, 1), dtype=np.float32))
            for _ in range(2)
        )
        level_B = policy.path.random_levels(rng.random(128))
        optimiser.zero_grad()
        policy.error(0.7 * clean, noise, level_B, condition).mean().backward()
        optimiser.step()
    policy.reference = policy.weights()
    return policy


@cache
def weights_of_some_data(make: type[ToyPolicy], seed: int) -> dict[str, torch.Tensor]:
    """``pretrained``'s weights, which every algorithm begins with."""
    return pretrained(make, seed).weights()


@cache
def learn(name: str, seed: int) -> tuple[float, float, float]:
    """(reward before, after, KL to the reference after, per step and element), on fixed units."""
    algorithm, make, plan, settings = CASES[name]
    policy, memory = make(seed=seed), Memory()
    policy.set_weights(weights_of_some_data(make, seed))
    policy.reference = policy.weights()
    chosen = LearnerSettings(**{"lr": 1e-2, "updates_per_round": 2, **settings})
    learner = Learner(policy, algorithm.loss, chosen, seed=seed, copies=algorithm.copies)
    fixed = make_units(1, per_unit=256, plan=plan, seed=99, round=0)
    before = np.mean([s.total_B.mean() for s in looked_at(policy, fixed)])
    for round in range(1, ROUNDS + 1):
        units = make_units(UNITS, per_unit=PER_UNIT, plan=plan, seed=seed, round=round)
        if algorithm.eats.sampled_by_loss:
            learner.update(PromptBatch(units=tuple(units), scorer=scorer), round=round)
        else:
            with policy.holding(learner.weights().tensors):
                scored = looked_at(policy, units)
            learner.update(algorithm.make_batch(scored, memory), round=round)
    last = looked_at(policy, fixed)
    return (
        float(before),
        float(np.mean([s.total_B.mean() for s in last])),
        kl_to_reference(policy, last),
    )


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


@pytest.mark.promise
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_the_reward_rises(name: str, seed: int) -> None:
    """256 fixed samples before and after: up by more than 0.1 with each seed (seen: 0.19 to
    0.52)."""
    before, after, _ = learn(name, seed)
    assert after > before + 0.1, (before, after)


@pytest.mark.promise
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUDGETS)
def test_the_distance_to_the_reference_stays_within_its_budget(name: str, seed: int) -> None:
    """On the fixed samples; it is above 0.1 of it, so that the budget says something."""
    kl = learn(name, seed)[2]
    assert 0.1 * BUDGETS[name] < kl < BUDGETS[name], kl


@pytest.mark.promise
@pytest.mark.parametrize("seed", SEEDS)
def test_dpok_stays_nearer_to_the_reference_than_ddpo(seed: int) -> None:
    """Less than a fifth of DDPO's KL (seen: a fourteenth or less)."""
    assert learn("dpok", seed)[2] < 0.2 * learn("ddpo", seed)[2]
