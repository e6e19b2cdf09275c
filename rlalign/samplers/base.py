"""What a sampler is: a recipe that decides which latents to try, look at, weigh and keep; an engine does the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from rlalign.diffusion.noise import generator
from rlalign.diffusion.steps import Gaussian
from rlalign.records import Plan, Unit
from rlalign.registry import Recipe, UserError
from rlalign.work import Engine, NoScore, Seen, Swarm

BACKWARD = 2
"""Denoiser calls that going back through one counts as, where methods get the same budget."""

MOST = 1 << 16
"""Largest number of candidates, particles or updates that a budget may buy."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method came to: one latent for each row that it was asked for."""

    latents: torch.Tensor
    """(B, C, H, W) clean latents."""
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Name -> one number a step or update, averaged over pictures: what the report draws."""
    roots_BN: np.ndarray | None = None
    """(B, N) which first particle each last one descends from, where particles were resampled."""
    log_evidence_B: np.ndarray | None = None
    """(B,) estimate of log E[exp(strength * reward)] under the plain sampler, where the method has one (unbiased without log)."""


class Sampler(Recipe):
    """Base of a test-time method."""

    shelf: ClassVar[str] = "samplers"
    needs_gradient: ClassVar[bool] = False
    """Whether it follows the gradient of the rewards."""
    needs_noise: ClassVar[bool] = False
    """Whether steps without noise leave it nothing to choose."""
    width: ClassVar[str] = ""
    """The setting that a budget of denoiser calls decides; empty where nothing is to decide."""

    def sample(self, engine: Engine, unit: Unit) -> Found:
        """One latent for each row of the unit."""
        raise NotImplementedError

    def calls(self, plan: Plan) -> int:
        """Denoiser calls a picture, a guided pass counted twice; going back through them not counted."""
        raise NotImplementedError

    def backward(self, plan: Plan) -> int:
        """Of these, the ones that a gradient goes back through."""
        return 0

    def price(self, plan: Plan) -> int:
        """Calls a picture with each way back counted as two more: what budgets and comparisons are made in."""
        return self.calls(plan) + BACKWARD * self.backward(plan)

    def within(self, budget: int, plan: Plan) -> Sampler:
        """The method with the largest width whose price a picture fits a budget."""
        if not self.width:
            return self
        low, high = 1, 1
        if self._sized(1).price(plan) > budget:
            raise UserError(
                f"budget.denoiser_calls must be >= {self._sized(1).price(plan)} for {self.name} with this plan, got {budget}"
            )
        while high < MOST and self._sized(2 * high).price(plan) <= budget:
            high *= 2
        low, high = high, min(2 * high, MOST)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._sized(middle).price(plan) <= budget else (low, middle - 1)
        return self._sized(low)

    def _sized(self, width: int) -> Sampler:
        return self.model_copy(update={self.width: width})


def passes(plan: Plan) -> int:
    """Denoiser calls of one look."""
    return 1 if plan.guidance == 1.0 else 2


def grouped(values_M: np.ndarray, count: int) -> np.ndarray:
    """(B * N,) -> (B, N) float64."""
    return np.asarray(values_M, dtype=np.float64).reshape(-1, count)


def best(values_BN: np.ndarray, x: torch.Tensor) -> np.ndarray:
    """(B,) index of the largest value, the first of equals; candidates without a value are dropped.

    Raises NoScore, with the latents so far, where none of a picture's candidates has one.
    """
    known_BN = np.isfinite(values_BN)
    refuse_unscored(known_BN, x)
    return np.where(known_BN, values_BN, -np.inf).argmax(axis=1)


def refuse_unscored(known_BN: np.ndarray, x: torch.Tensor) -> None:
    """Raises NoScore where a picture is left without a single scored candidate."""
    empty = np.flatnonzero(~known_BN.any(axis=1))
    if len(empty):
        raise NoScore(
            f"the rewards gave no score for any of the {known_BN.shape[1]} candidates of picture {int(empty[0]) + 1}", x
        )


def take(x: torch.Tensor, index_B: np.ndarray, count: int) -> torch.Tensor:
    """Row b * count + index_B[b] of each group of ``count`` rows."""
    return x[torch.from_numpy(np.arange(len(index_B)) * count + index_B)]


def take_seen(seen: Seen, rows: np.ndarray) -> Seen:
    """The rows of what was seen."""
    index = torch.from_numpy(np.ascontiguousarray(rows))
    total = seen.total_B[rows] if seen.total_B is not None else None
    return Seen(
        Gaussian(mean=seen.gaussian.mean[index], std=seen.gaussian.std), seen.clean[index], seen.noise[index], total
    )


def of_swarm(swarm: Swarm, keep: Literal["best", "weighted"]) -> Found:
    """One particle of each picture, with the lineage of all."""
    return Found(
        latents=take(swarm.x, swarm.chosen(keep), swarm.count),
        series={"effective sample size": tuple(swarm.sizes)},
        roots_BN=swarm.roots_BN,
        log_evidence_B=swarm.log_evidence_B,
    )


def row_rng(unit: Unit, row: int, *purpose: Any) -> np.random.Generator:
    """A generator keyed by a row of a unit and a purpose, apart from the noise of its steps."""
    key = unit.key
    return generator("sampler", unit.seed, key.stream, key.round, unit.prompt_ids[row], unit.sample_ids[row], *purpose)
