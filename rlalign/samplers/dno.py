"""DNO: all noises of a chain are optimised together, held where Gaussian noise lives by a
concentration bound."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.noise import generator, unit_noise
from rlalign.engine import Engine, score_rows
from rlalign.engine.chains import ChainEnd, ChainGradient, Pulled
from rlalign.samplers.base import NonNegative, Result, Sampler, best_updates, per_row

FLOOR = 4.0 * math.log(2.0)
"""What the regulariser is worth for noise that passes every test."""


class Dno(Sampler):
    """All noises of the chain are optimised for the reward, and held where Gaussian noise lives.

    Adam ascent on x_T and the noise of every step, through the whole chain by checkpointing; the
    best update is kept. The regulariser is minus the log of a bound on the probability that blocks
    of standard normal noise have a mean and a covariance so far from 0 and 1, as they are and under
    random permutations.

    Source: Tang 2024, arXiv:2405.18881.
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "updates"

    updates: int = Field(default=10, ge=1, description="M, updates of the noises")
    lr: NonNegative = Field(default=0.05, description="Adam's rate; 0 is plain")
    regularise: NonNegative = Field(default=1.0, description="gamma, weight of the regulariser")
    block: int = Field(default=4, ge=1, description="numbers in a block")
    permutations: int = Field(
        default=16, ge=1, description="random orders that blocks are taken in"
    )

    def sample(self, engine: Engine, unit: Unit) -> Result:
        shape = engine.latent_shape(unit.plan)
        steps = unit.plan.steps
        noises = torch.stack([unit_noise(unit, k, shape) for k in range(steps + 1)], dim=1)
        parameter = torch.nn.Parameter(noises.clone())
        optimizer = torch.optim.AdamW([parameter], lr=self.lr, weight_decay=0.0)
        tried = []
        rewards = []
        # ascend from the plain noises; the last look goes down the chain only
        for update in range(self.updates + 1):
            now = parameter.detach()
            if update == self.updates or not self.lr:
                x = _ends(engine, unit, now)
                scored = score_rows(engine, unit, x, steps).total_B if self.lr else np.zeros(len(x))
                tried.append((scored, x))
                break
            # the reward and its gradient for every noise
            found: list[Pulled] = engine.each(
                unit, lambda some, cut, now=now: ChainGradient(unit=some, noises=now[cut])
            )
            total_B = np.concatenate([f.total_B for f in found])
            tried.append((total_B, torch.cat([f.clean for f in found])))
            rewards.append(float(np.nanmean(total_B)))
            gradient = torch.cat([f.gradient for f in found])
            parameter.grad = -gradient.to(parameter) + self._push(parameter, unit, update)
            # each for itself
            norm_B = parameter.grad.flatten(1).norm(dim=1).clamp(min=1.0)
            parameter.grad /= per_row(norm_B, noises)
            optimizer.step()
        return Result(latents=best_updates(tried), series={"reward": tuple(rewards)})

    def _push(self, noises: torch.Tensor, unit: Unit, update: int) -> torch.Tensor:
        """Gradient of the regulariser, summed over pictures."""
        if not self.regularise:
            return torch.zeros_like(noises)
        rng = generator("dno", unit.seed, unit.key.stream, unit.key.round, update)
        flat_BD = noises.detach().flatten(1).requires_grad_()
        orders = [rng.permutation(flat_BD.shape[1]) for _ in range(self.permutations)]
        value = torch.stack(
            [gaussian_concentration(row, self.block, orders) for row in flat_BD]
        ).sum()
        (gradient,) = torch.autograd.grad(self.regularise * value, flat_BD)
        return gradient.reshape(noises.shape)

    def looks(self, plan: Plan) -> int:
        """Down and, step by step, again on the way back; the last chain goes down only."""
        return plan.steps * (2 * self.updates + 1)

    def looks_back(self, plan: Plan) -> int:
        return plan.steps * self.updates


def _ends(engine: Engine, unit: Unit, noises: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = engine.each(
        unit, lambda some, cut: ChainEnd(unit=some, noises=noises[cut])
    )
    return torch.cat(found)


def gaussian_concentration(
    noise_D: torch.Tensor, block: int, orders: list[np.ndarray]
) -> torch.Tensor:
    """-(log P_mean + log P_covariance), as given and averaged over permutations; at least 4 log 2.

    With n blocks of k numbers, M1 the norm of their mean and M2 the spectral norm of covariance -
    1: log P_mean = min(-log 2, -n M1^2 / (2 k)), log P_covariance = min(-log 2, -n max(0, sqrt(1 +
    M2) - 1 - sqrt(k / n))^2 / 2).
    """
    shuffled = [_log_probability(noise_D[torch.from_numpy(order)], block) for order in orders]
    return -(_log_probability(noise_D, block) + torch.stack(shuffled).mean())


def _log_probability(noise_D: torch.Tensor, block: int) -> torch.Tensor:
    count = len(noise_D) // block
    blocks_NK = noise_D[: count * block].reshape(count, block)
    mean = (blocks_NK.mean(dim=0) ** 2).sum()
    covariance = blocks_NK.T @ blocks_NK / count - torch.eye(block, dtype=noise_D.dtype)
    gap = torch.linalg.matrix_norm(covariance, ord=2)
    excess = (torch.sqrt(1.0 + gap) - 1.0 - math.sqrt(block / count)).clamp(min=0.0)
    half = torch.tensor(-math.log(2.0), dtype=noise_D.dtype)
    return torch.minimum(half, -count * mean / (2.0 * block)) + torch.minimum(
        half, -count * excess**2 / 2.0
    )
