"""LiDAR: a few cheap samples are scored once, and pull the chain towards the good ones without any
gradient."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import noise_of, step
from rlalign.engine import Engine, advance_and_score_rows, expand, look_rows
from rlalign.engine.particles import normalise
from rlalign.samplers.base import NonNegative, Result, Sampler, group_rows, refuse_unscored


class Lidar(Sampler):
    """A few cheap samples are scored once and pull the chain towards the good ones, without any
    gradient.

    M look-ahead samples of few steps, X_i with rewards r_i, give the guide in closed form at every
    step: guide = alpha / sigma^2 * sum (w^r_i - w_i) X_i with w = softmax(-|x - alpha X|^2 / (2
    sigma^2)), and w^r the same with strength * r_i added: the gradient of log E[exp(strength * r) |
    x] if the look-aheads were all there is. The noise seen becomes noise - scale * sigma * guide.

    Source: LiDAR, arXiv:2602.03211.
    """

    width: ClassVar[str] = "look_aheads"

    look_aheads: int = Field(default=16, ge=1, description="M, cheap samples a picture")
    look_ahead_steps: int = Field(default=4, ge=1, description="their denoising steps")
    strength: NonNegative = Field(default=10.0, description="lambda, 1 / reward units; 0 is plain")
    scale: NonNegative = Field(default=1.0, description="factor of the guide; 0 is plain")

    def sample(self, engine: Engine, unit: Unit) -> Result:
        ahead, reward_BM = self._look_ahead(engine, unit)
        schedule = schedule_of(engine.path, unit)
        path = engine.path
        x = engine.begin(unit)
        sizes = []
        # the plain chain, its noise moved by the guide
        for k in range(unit.plan.steps):
            seen = look_rows(engine, unit, x, k)
            levels = schedule.levels
            exact = coefficients(path, levels[k], x.double())
            guide, size = self._guide(x, ahead, reward_BM, *exact)
            sizes.append(size)
            if guide is not None:
                alpha, sigma = coefficients(path, levels[k], x)
                noise = seen.noise - self.scale * sigma * guide.to(x)
                clean = torch.where(
                    alpha > 0, (x - sigma * noise) / alpha.clamp(min=1e-12), seen.clean
                )
                now = levels[k]
                then = levels[k + 1]
                how = {**noise_of(unit.plan), "eta": schedule.eta_K[k]}
                gaussian = step(x, clean, noise, path, now, then, **how)
                seen = seen._replace(gaussian=gaussian)
            x = seen.next(unit, k)
        return Result(latents=x, series={"look-aheads that count": tuple(sizes)})

    def _look_ahead(self, engine: Engine, unit: Unit) -> tuple[torch.Tensor, np.ndarray]:
        """((B, M, ...) float64 samples, (B, M) rewards; a sample without a reward has -inf)."""
        steps = self.look_ahead_steps
        short = unit.with_plan(steps=steps, eta=0.0, rule="ddim", window=0)
        rows = expand(short, self.look_aheads)
        reached, scores = advance_and_score_rows(engine, rows, None, 0, steps)
        x = reached.x
        reward_BM = group_rows(scores.total_B, self.look_aheads)
        known_BM = np.isfinite(reward_BM)
        refuse_unscored(known_BM, x)
        samples = x.double().reshape(len(unit.prompts), self.look_aheads, *x.shape[1:])
        return samples, np.where(known_BM, reward_BM, -np.inf)

    def _guide(
        self,
        x: torch.Tensor,
        ahead: torch.Tensor,
        reward_BM: np.ndarray,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
    ) -> tuple[torch.Tensor | None, float]:
        """(the guide or None where there is none, the effective number of look-aheads that it
        weighs)."""
        flat_BMD = ahead.flatten(2)
        x_B1D = x.double().flatten(1)[:, None]
        a = float(alpha.reshape(-1)[0])
        s = float(sigma.reshape(-1)[0])
        # weights of the look-aheads by distance, and by distance and reward
        near_BM = (-((x_B1D - a * flat_BMD) ** 2).sum(-1) / (2.0 * s * s)).numpy()
        w_BM = normalise(np.where(np.isfinite(reward_BM), near_BM, -np.inf))
        r_BM = normalise(
            near_BM + self.strength * np.where(np.isfinite(reward_BM), reward_BM, -np.inf)
        )
        size = float((1.0 / np.square(r_BM).sum(axis=1)).mean())
        if not self.strength or not self.scale or a == 0.0 or np.array_equal(w_BM, r_BM):
            return None, size
        pull_BD = torch.einsum("bm,bmd->bd", torch.from_numpy(r_BM - w_BM), flat_BMD)
        return (a / (s * s) * pull_BD).reshape(x.shape), size

    def looks(self, plan: Plan) -> int:
        return plan.steps + self.look_aheads * self.look_ahead_steps
