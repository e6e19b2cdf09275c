"""LiDAR: a few cheap samples are scored once, and pull the chain towards the good ones without any gradient."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import step
from rlalign.particles import normalised
from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, grouped, passes, refuse_unscored
from rlalign.work import Engine, advance_rows, expand, look_rows, score_rows


class Lidar(Sampler):
    """A few cheap samples are scored once and pull the chain towards the good ones, without any gradient.

    M look-ahead samples of few steps, X_i with rewards r_i, give the guide in closed form at every step:
    guide = alpha / sigma^2 * sum (w^r_i - w_i) X_i with w = softmax(-|x - alpha X|^2 / (2 sigma^2)), and w^r the same with
    strength * r_i added: the gradient of log E[exp(strength * r) | x] if the look-aheads were all there is. The noise seen
    becomes noise - scale * sigma * guide.

    Source: LiDAR, arXiv:2602.03211.
    """

    width: ClassVar[str] = "look_aheads"

    look_aheads: int = Field(default=16, ge=1, description="M, cheap samples a picture")
    look_ahead_steps: int = Field(default=4, ge=1, description="their denoising steps")
    strength: float = Field(default=10.0, ge=0, allow_inf_nan=False, description="lambda, 1 / reward units; 0 is plain")
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="factor of the guide; 0 is plain")

    def sample(self, engine: Engine, unit: Unit) -> Found:
        ahead, reward_BM = self._look_ahead(engine, unit)
        schedule, path = schedule_of(engine.path, unit), engine.path
        x = engine.begin(unit)
        sizes = []
        for k in range(unit.plan.steps):
            seen, levels = look_rows(engine, unit, x, k), schedule.levels
            guide, size = self._guide(x, ahead, reward_BM, *coefficients(path, levels[k], x.double()))
            sizes.append(size)
            if guide is not None:
                alpha, sigma = coefficients(path, levels[k], x)
                noise = seen.noise - self.scale * sigma * guide.to(x)
                clean = torch.where(alpha > 0, (x - sigma * noise) / alpha.clamp(min=1e-12), seen.clean)
                now, then, eta = levels[k], levels[k + 1], schedule.eta_K[k]
                gaussian = step(x, clean, noise, path, now, then, rule=unit.plan.rule, eta=eta)
                seen = seen._replace(gaussian=gaussian)
            x = seen.next(unit, k)
        return Found(latents=x, series={"look-aheads that count": tuple(sizes)})

    def _look_ahead(self, engine: Engine, unit: Unit) -> tuple[torch.Tensor, np.ndarray]:
        """((B, M, ...) float64 samples, (B, M) rewards; a sample without a reward has -inf)."""
        plan = unit.plan.model_copy(update={"steps": self.look_ahead_steps, "eta": 0.0, "rule": "ddim", "window": 0})
        rows = expand(unit.__class__(**{**vars(unit), "plan": plan}), self.look_aheads)
        x = advance_rows(engine, rows, None, 0, plan.steps).x
        reward_BM = grouped(score_rows(engine, rows, x, plan.steps).total_B, self.look_aheads)
        known_BM = np.isfinite(reward_BM)
        refuse_unscored(known_BM, x)
        return x.double().reshape(len(unit.prompts), self.look_aheads, *x.shape[1:]), np.where(
            known_BM, reward_BM, -np.inf
        )

    def _guide(
        self, x: torch.Tensor, ahead: torch.Tensor, reward_BM: np.ndarray, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor | None, float]:
        """(the guide or None where there is none, the effective number of look-aheads that it weighs)."""
        flat_BMD, x_B1D = ahead.flatten(2), x.double().flatten(1)[:, None]
        a, s = float(alpha.reshape(-1)[0]), float(sigma.reshape(-1)[0])
        near_BM = (-((x_B1D - a * flat_BMD) ** 2).sum(-1) / (2.0 * s * s)).numpy()
        w_BM = normalised(np.where(np.isfinite(reward_BM), near_BM, -np.inf))
        r_BM = normalised(near_BM + self.strength * np.where(np.isfinite(reward_BM), reward_BM, -np.inf))
        size = float((1.0 / np.square(r_BM).sum(axis=1)).mean())
        if not self.strength or not self.scale or a == 0.0 or np.array_equal(w_BM, r_BM):
            return None, size
        pull_BD = torch.einsum("bm,bmd->bd", torch.from_numpy(r_BM - w_BM), flat_BMD)
        return (a / (s * s) * pull_BD).reshape(x.shape), size

    def calls(self, plan: Plan) -> int:
        return passes(plan) * (plan.steps + self.look_aheads * self.look_ahead_steps)
