"""ReNO: the starting noise of a few-step model is optimised, and kept at the norm that noise
has."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.engine import Engine
from rlalign.engine.chains import ChainGradient, Pulled
from rlalign.samplers.base import NonNegative, Result, Sampler, best_updates, per_row
from rlalign.samplers.doodl import without_noise


class Reno(Sampler):
    """The starting noise of a few-step model is optimised for the reward, and kept at the norm that
    noise has.

    Nesterov ascent on x_T for the reward minus ``regularise`` * (|x|^2 / 2 - (d - 1) log |x|); the
    best update is kept. Made for one-step models; any chain without noise does, with its steps'
    worth of calls.

    Source: Eyring 2024, arXiv:2406.04312, section 3.
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "updates"

    updates: int = Field(default=10, ge=1, description="updates of the noise")
    lr: NonNegative = Field(default=5.0, description="rate; 0 is plain")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Nesterov's momentum")
    clip: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="largest norm of a picture's gradient"
    )
    regularise: NonNegative = Field(default=0.01, description="weight of the norm's log-likelihood")

    def sample(self, engine: Engine, unit: Unit) -> Result:
        quiet = without_noise(unit)
        z = engine.begin(unit)
        speed = torch.zeros_like(z)
        tried = []
        rewards = []
        # ascend from the plain noise, and keep every picture on the way
        for _ in range(self.updates + 1):
            found: list[Pulled] = engine.each(
                quiet, lambda some, cut, z=z: ChainGradient(unit=some, noises=z[cut][:, None])
            )
            total_B = np.concatenate([f.total_B for f in found])
            tried.append((total_B, torch.cat([f.clean for f in found])))
            rewards.append(float(np.nanmean(total_B)))
            pull = torch.cat([f.gradient for f in found])[:, 0].to(z)
            gradient = -pull + self.regularise * norm_gradient(z)
            size_B = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            gradient = gradient * (self.clip / per_row(size_B, z)).clamp(max=1.0)
            speed = self.momentum * speed + gradient
            z = z - self.lr * (gradient + self.momentum * speed)
            if not self.lr:
                break
        return Result(latents=best_updates(tried), series={"reward": tuple(rewards)})

    def looks(self, plan: Plan) -> int:
        return plan.steps * 2 * (self.updates + 1)

    def looks_back(self, plan: Plan) -> int:
        return plan.steps * (self.updates + 1)


def norm_gradient(z: torch.Tensor) -> torch.Tensor:
    """Gradient of |z|^2 / 2 - (d - 1) log |z| for each picture; 0 at |z| = sqrt(d - 1), the mode of
    a Gaussian's norm."""
    square = per_row((z**2).flatten(1).sum(dim=1).clamp(min=1e-12), z)
    return z * (1.0 - (z[0].numel() - 1) / square)
