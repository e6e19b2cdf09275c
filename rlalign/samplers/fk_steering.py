"""Feynman-Kac steering: particles that are weighed and resampled on the way, without gradients."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from rlalign.core.records import Unit
from rlalign.engine import Engine, Swarm, flat_rows, look_rows, score_rows
from rlalign.samplers.base import (
    Keep,
    NonNegative,
    ParticleSampler,
    Resampling,
    Threshold,
    group_rows,
)


class FkSteering(ParticleSampler):
    """N particles follow the plain sampler, weighed and resampled by the reward of what is seen.

    Potentials: exp(strength * (r - r before)) ("difference"), exp(strength * largest r so far)
    ("max"), exp(strength * sum of r) ("sum"). Whatever was spent on the way, the last potential
    makes the product exp(strength * r(x_0)), so the weighted particles target p(x_0) exp(strength *
    r(x_0)) for every choice; weights are carried where a step does not resample.

    Source: Singhal 2025, arXiv:2501.06848; resampling as in sequential Monte Carlo (Del Moral
    2006).
    """

    particles: int = Field(default=8, ge=1, description="N, particles a picture")
    strength: NonNegative = Field(
        default=10.0, description="lambda, in 1 / reward units; 0 is plain"
    )
    potential: Literal["difference", "max", "sum"] = Field(
        default="difference", description="how rewards weigh"
    )
    every: int = Field(default=1, ge=1, description="steps between two weighings")
    start: float = Field(
        default=0.2, ge=0, le=1, description="share of the steps before the first weighing"
    )
    scheme: Resampling = "systematic"
    threshold: Threshold = 0.5
    keep: Keep = "best"

    def run(self, engine: Engine, unit: Unit) -> Swarm:
        rows, swarm = self.begin(engine, unit)
        count = swarm.count
        steps = unit.plan.steps
        spent_BN = np.zeros((len(unit.prompts), count))
        history_BN = _nothing(self.potential, spent_BN.shape)
        # look, weigh and resample, step
        for k in range(steps):
            weighs = self._weighs(k, steps)
            seen = look_rows(engine, rows, swarm.x, k, score=weighs)
            if weighs and seen.total_B is not None:
                reward_BN = swarm.fill_missing(group_rows(seen.total_B, count))
                gain_BN, history_BN = self._gain(reward_BN, history_BN)
                spent_BN = spent_BN + gain_BN
                swarm.weigh(gain_BN)
                parents = swarm.resample(k)
                if parents is not None:
                    # everything that belongs to a particle moves with it
                    spent_BN, history_BN = (
                        np.take_along_axis(a, parents, axis=1) for a in (spent_BN, history_BN)
                    )
                    seen = seen.take(flat_rows(parents))
            swarm.x = seen.next(rows, k)
        # the last potential pays what is left of the reward
        reward_BN = swarm.fill_missing(
            group_rows(score_rows(engine, rows, swarm.x, steps).total_B, count)
        )
        swarm.weigh(self.strength * reward_BN - spent_BN)
        swarm.finish(reward_BN)
        return swarm

    def _weighs(self, k: int, steps: int) -> bool:
        first = max(1, round(self.start * steps))
        return self.strength > 0 and k >= first and (k - first) % self.every == 0

    def _gain(self, reward_BN: np.ndarray, history_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log potential, what the next weighing needs to know)."""
        if self.potential == "difference":
            return self.strength * (reward_BN - history_BN), reward_BN
        history_BN = (
            np.maximum(history_BN, reward_BN) if self.potential == "max" else history_BN + reward_BN
        )
        return self.strength * history_BN, history_BN


def _nothing(potential: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, -np.inf if potential == "max" else 0.0)
