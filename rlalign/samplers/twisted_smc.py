"""Twisted sequential Monte Carlo: particles that are proposed along the gradient of the reward and
weighed exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import schedule_of
from rlalign.engine import (
    Engine,
    Rewards,
    Swarm,
    Work,
    flat_rows,
    reward_gradient,
    score_rows,
    see,
)
from rlalign.policies.base import Policy
from rlalign.samplers.base import (
    Keep,
    NonNegative,
    ParticleSampler,
    Resampling,
    Threshold,
    group_rows,
)


class TwistedSmc(ParticleSampler):
    """N particles follow the reward's gradient and are weighed exactly for it.

    They are moved by std^2 * tempering * strength * grad r and weighed by the twist exp(tempering *
    strength * r). r is the reward of the clean sample seen in a latent, differentiated through
    decoder and denoiser; weights take the ratio of kernel and proposal, so the weighted particles
    target p(x_0) exp(strength * r(x_0)). ``growth`` g tempers by min((1 + g)^i - 1, 1) at step i
    (DAS); 0 is no tempering (TDS).

    Source: Wu 2023, arXiv:2306.17775 (TDS); Kim 2025, arXiv:2501.05803 (DAS).
    """

    needs_gradient: ClassVar[bool] = True

    particles: int = Field(default=4, ge=1, description="N, particles a picture")
    strength: NonNegative = Field(default=1.0, description="lambda, 1 / reward units; 0 is plain")
    growth: NonNegative = Field(default=0.0, description="g of the tempering; 0 is none")
    scheme: Resampling = "systematic"
    threshold: Threshold = 0.5
    keep: Keep = "best"

    def run(self, engine: Engine, unit: Unit) -> Swarm:
        steps = unit.plan.steps
        count = self.particles
        rows, swarm = self.begin(engine, unit)
        stochastic_K = schedule_of(engine.path, unit).stochastic_K.tolist()
        twist_BN = np.zeros((len(unit.prompts), count))
        correction_BN = np.zeros_like(twist_BN)
        for k in range(steps):
            seen = _look(engine, rows, swarm.x, k)
            before_BN = twist_BN
            twist_BN = self._tempered(k) * swarm.fill_missing(group_rows(seen.total_B, count))
            if self.strength:
                swarm.weigh(correction_BN + twist_BN - before_BN)
            parents = swarm.resample(k)
            if parents is not None:
                # latents, twists and gradients belong to a particle: all move with it
                twist_BN = np.take_along_axis(twist_BN, parents, axis=1)
                seen = seen.take(flat_rows(parents))
            z = unit_noise(rows, k + 1, swarm.x.shape[1:]).to(swarm.x)
            if stochastic_K[k]:
                push = seen.std * self._tempered(k + 1 if k + 1 < steps else k) * seen.gradient
                swarm.x = (
                    seen.mean + seen.std * (push + z) if self.strength else seen.mean + seen.std * z
                )
                # log p - log q of x = mean + std * (push + z), whatever the std
                log_ratio = 0.5 * (z.double() ** 2 - (z + push).double() ** 2)
                correction_BN = group_rows(log_ratio.flatten(1).sum(1).numpy(), count)
            else:
                swarm.x = seen.mean
                correction_BN = np.zeros_like(correction_BN)
        reward_BN = swarm.fill_missing(
            group_rows(score_rows(engine, rows, swarm.x, steps).total_B, count)
        )
        swarm.weigh(correction_BN + self.strength * reward_BN - twist_BN)
        swarm.finish(reward_BN)
        return swarm

    def _tempered(self, k: int) -> float:
        """Strength times the tempering of step ``k``."""
        return self.strength * (min((1.0 + self.growth) ** k - 1.0, 1.0) if self.growth else 1.0)

    def looks_back(self, plan: Plan) -> int:
        return self.looks(plan)


class _Pulled(NamedTuple):
    """The next latent's Gaussian, the reward of what is seen, and its gradient."""

    mean: torch.Tensor
    std: torch.Tensor
    gradient: torch.Tensor
    total_B: np.ndarray

    def take(self, rows: np.ndarray) -> _Pulled:
        index = torch.from_numpy(rows)
        return _Pulled(self.mean[index], self.std, self.gradient[index], self.total_B[rows])


@dataclass(frozen=True, kw_only=True)
class _Pull(Work):
    """What the policy sees at step ``k``, and d reward / d latent through it."""

    x: torch.Tensor
    k: int

    def do(self, policy: Policy, rewards: Rewards) -> _Pulled:
        with torch.enable_grad():
            x = self.x.to(policy.device).detach().requires_grad_()
            found = see(policy, self.unit, schedule_of(policy.path, self.unit), self.k, x)
            total_B, gradient = reward_gradient(policy, rewards, found.clean, self.unit.prompts, x)
        return _Pulled(
            found.gaussian.mean.detach().cpu(),
            found.gaussian.std.detach().cpu(),
            gradient.cpu(),
            total_B,
        )


def _look(engine: Engine, rows: Unit, x: torch.Tensor, k: int) -> _Pulled:
    found: list[_Pulled] = engine.each(rows, lambda some, cut: _Pull(unit=some, x=x[cut], k=k))
    return _Pulled(
        torch.cat([f.mean for f in found]),
        found[0].std,
        torch.cat([f.gradient for f in found]),
        np.concatenate([f.total_B for f in found]),
    )
