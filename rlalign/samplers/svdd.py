"""SVDD: at every step, the best of a few next latents by the reward of what they promise."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.noise import row_generator, unit_noise
from rlalign.diffusion.rollout import schedule_of
from rlalign.engine import Engine, View, expand, look_rows, score_rows
from rlalign.engine.particles import normalise
from rlalign.samplers.base import (
    NonNegative,
    Result,
    Sampler,
    best,
    group_rows,
    refuse_unscored,
    take,
)


class Svdd(Sampler):
    """Of M next latents drawn at each step one is kept, by the reward of what it promises.

    It is kept with probability softmax(value / alpha), the best at alpha 0. The value of a latent
    is the reward of the clean sample that the policy sees in it; no gradient, no interaction
    between pictures. Equal values keep the first candidate, which has the plain sampler's noise.

    Source: Li 2024, arXiv:2408.08252 (SVDD-PM).
    """

    needs_noise: ClassVar[bool] = True
    width: ClassVar[str] = "candidates"

    candidates: int = Field(default=8, ge=1, description="M, next latents drawn at each step")
    alpha: NonNegative = Field(default=0.0, description="temperature, reward units; 0 is greedy")

    def sample(self, engine: Engine, unit: Unit) -> Result:
        steps = unit.plan.steps
        count = self.candidates
        rows = expand(unit, count)
        stochastic_K = schedule_of(engine.path, unit).stochastic_K.tolist()
        x = engine.begin(unit)
        seen = look_rows(engine, unit, x, 0)
        values = []
        # every step: draw candidates of the next latent, keep one
        for k in range(steps):
            if stochastic_K[k]:
                mean = seen.gaussian.mean.repeat_interleave(count, dim=0)
                drawn = mean + seen.gaussian.std * unit_noise(rows, k + 1, x.shape[1:]).to(mean)
                value_M, looks = self.values(engine, rows, drawn, k + 1)
                value_BM = group_rows(value_M, count)
                index_B = self._choose(value_BM, drawn, unit, k)
                x = take(drawn, index_B, count)
                values.append(float(np.mean(value_BM[np.arange(len(index_B)), index_B])))
                if looks is not None:
                    seen = looks.take(np.arange(len(index_B)) * count + index_B)
            else:
                x = seen.gaussian.mean
                seen = look_rows(engine, unit, x, k + 1) if k + 1 < steps else seen
        return Result(latents=x, series={"value": tuple(values)})

    def values(
        self, engine: Engine, rows: Unit, x: torch.Tensor, k: int
    ) -> tuple[np.ndarray, View | None]:
        """(soft values of latents at step ``k``, what the policy saw in them; None at the end)."""
        if k == rows.plan.steps:
            return score_rows(engine, rows, x, k).total_B, None
        seen = look_rows(engine, rows, x, k, score=True)
        assert seen.total_B is not None
        return seen.total_B, seen

    def _choose(self, value_BM: np.ndarray, x: torch.Tensor, unit: Unit, k: int) -> np.ndarray:
        if not self.alpha:
            return best(value_BM, x)
        refuse_unscored(np.isfinite(value_BM), x)
        w_BM = normalise(value_BM / self.alpha)
        chosen = [
            row_generator(unit, b, "sampler", "svdd", k).choice(len(w_M), p=w_M)
            for b, w_M in enumerate(w_BM)
        ]
        same_B = np.nanmax(value_BM, axis=1) == np.nanmin(value_BM, axis=1)
        return np.where(same_B, best(value_BM, x), np.array(chosen))

    def looks(self, plan: Plan) -> int:
        return 1 + (plan.steps - 1) * self.candidates
