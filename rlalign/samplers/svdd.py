"""SVDD: at every step, the best of a few next latents by the reward of what they promise."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import schedule_of
from rlalign.particles import normalised
from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, best, grouped, passes, refuse_unscored, row_rng, take, take_seen
from rlalign.work import Engine, Seen, expand, look_rows, score_rows


class Svdd(Sampler):
    """Of M next latents drawn at each step one is kept, by the reward of what it promises.

    It is kept with probability softmax(value / alpha), the best at alpha 0. The value of a latent is the reward of the
    clean sample that the policy sees in it; no gradient, no interaction between pictures. Equal values keep the first
    candidate, which has the plain sampler's noise.

    Source: Li 2024, arXiv:2408.08252 (SVDD-PM).
    """

    needs_noise: ClassVar[bool] = True
    width: ClassVar[str] = "candidates"

    candidates: int = Field(default=8, ge=1, description="M, next latents drawn at each step")
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="temperature, reward units; 0 is greedy")

    def sample(self, engine: Engine, unit: Unit) -> Found:
        steps, count = unit.plan.steps, self.candidates
        rows, stochastic_K = expand(unit, count), schedule_of(engine.path, unit).stochastic_K.tolist()
        x = engine.begin(unit)
        seen = look_rows(engine, unit, x, 0)
        values = []
        for k in range(steps):
            if stochastic_K[k]:
                mean = seen.gaussian.mean.repeat_interleave(count, dim=0)
                drawn = mean + seen.gaussian.std * unit_noise(rows, k + 1, x.shape[1:]).to(mean)
                value_M, looks = self.values(engine, rows, drawn, k + 1)
                value_BM = grouped(value_M, count)
                index_B = self._choose(value_BM, drawn, unit, k)
                x = take(drawn, index_B, count)
                values.append(float(np.mean(value_BM[np.arange(len(index_B)), index_B])))
                if looks is not None:
                    seen = take_seen(looks, np.arange(len(index_B)) * count + index_B)
            else:
                x = seen.gaussian.mean
                seen = look_rows(engine, unit, x, k + 1) if k + 1 < steps else seen
        return Found(latents=x, series={"value": tuple(values)})

    def values(self, engine: Engine, rows: Unit, x: torch.Tensor, k: int) -> tuple[np.ndarray, Seen | None]:
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
        w_BM = normalised(value_BM / self.alpha)
        chosen = [row_rng(unit, b, "svdd", k).choice(w_BM.shape[1], p=w_BM[b]) for b in range(len(w_BM))]
        same_B = np.nanmax(value_BM, axis=1) == np.nanmin(value_BM, axis=1)
        return np.where(same_B, best(value_BM, x), np.array(chosen))

    def calls(self, plan: Plan) -> int:
        return passes(plan) * (1 + (plan.steps - 1) * self.candidates)
