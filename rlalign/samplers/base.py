"""What a sampler is: a recipe that decides which latents to try, look at, weigh and keep; an engine
does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.core.registry import Recipe, UserError
from rlalign.engine import Engine, NoScore, Swarm, expand
from rlalign.engine.particles import Scheme

BACKWARD = 2
"""Denoiser calls that going back through one counts as, where methods get the same budget."""

MOST = 1 << 16
"""Largest number of candidates, particles or updates that a budget may buy."""


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Resampling = Annotated[Scheme, Field(description="resampling scheme")]
Threshold = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="resample where the effective sample size is below this share; 1 always",
    ),
]
Keep = Annotated[Literal["best", "weighted"], Field(description="which particle is the picture")]
"""Settings of methods with particles."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a method came to: one latent for each row that it was asked for."""

    latents: torch.Tensor
    """(B, C, H, W) clean latents."""
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Name -> one number a step or update, averaged over pictures: what the report draws."""
    roots_BN: np.ndarray | None = None
    """(B, N) which first particle each last one descends from, where particles were resampled."""
    log_evidence_B: np.ndarray | None = None
    """(B,) estimate of log E[exp(strength * reward)] under the plain sampler, where the method has
    one (unbiased without log)."""


class Sampler(Recipe):
    """Base of a test-time method."""

    shelf: ClassVar[str] = "samplers"
    needs_gradient: ClassVar[bool] = False
    """Whether it follows the gradient of the rewards."""
    needs_noise: ClassVar[bool] = False
    """Whether steps without noise leave it nothing to choose."""
    width: ClassVar[str] = ""
    """The setting that a budget of denoiser calls decides; empty where nothing is to decide."""

    def check(self, unit: Unit) -> None:
        """Raises UserError, before anything is sampled, for files that the settings name and that
        cannot be used."""

    def sample(self, engine: Engine, unit: Unit) -> Result:
        """One latent for each row of the unit."""
        raise NotImplementedError

    def looks(self, plan: Plan) -> int:
        """How often a picture's denoiser is looked at; a guided look is one, whatever calls it
        takes."""
        raise NotImplementedError

    def looks_back(self, plan: Plan) -> int:
        """Of these, the ones that a gradient goes back through."""
        return 0

    def needs_whole(self, plan: Plan) -> bool:
        """Whether the process that does its pieces must hold the whole denoiser: gradients go back
        through it, or it is copied."""
        return self.looks_back(plan) > 0

    def price(self, plan: Plan, per_look: int) -> int:
        """Denoiser calls a picture with each way back counted as two more: what budgets and
        comparisons are made in. ``per_look`` are a policy's calls of one look."""
        return per_look * (self.looks(plan) + BACKWARD * self.looks_back(plan))

    def within(self, budget: int, plan: Plan, per_look: int) -> Sampler:
        """The method with the largest width whose price a picture fits a budget."""
        if not self.width:
            return self

        def costs(width: int) -> int:
            return self._sized(width).price(plan, per_look)

        if costs(1) > budget:
            raise UserError(
                f"budget.denoiser_calls must be >= {costs(1)} for {self.name} with this plan, got"
                f" {budget}"
            )

        # the width is doubled, and then looked for between the last two
        low = 1
        while low < MOST and costs(2 * low) <= budget:
            low *= 2
        high = min(2 * low, MOST)
        while low < high:
            middle = (low + high + 1) // 2
            if costs(middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return self._sized(low)

    def _sized(self, width: int) -> Sampler:
        return self.model_copy(update={self.width: width})


class ParticleSampler(Sampler):
    """Base of a method whose ``particles`` are weighed and resampled; it has the settings
    ``scheme``, ``threshold`` and ``keep`` too."""

    needs_noise: ClassVar[bool] = True
    width: ClassVar[str] = "particles"

    particles: int
    scheme: Resampling
    threshold: Threshold
    keep: Keep

    def sample(self, engine: Engine, unit: Unit) -> Result:
        return of_swarm(self.run(engine, unit), self.keep)

    def run(self, engine: Engine, unit: Unit) -> Swarm:
        """All particles with their weights."""
        raise NotImplementedError

    def begin(self, engine: Engine, unit: Unit) -> tuple[Unit, Swarm]:
        """The rows of all particles, and the particles at the unit's noise."""
        rows = expand(unit, self.particles)
        x = engine.begin(rows)
        return rows, Swarm(unit, x, self.particles, self.scheme, self.threshold)

    def looks(self, plan: Plan) -> int:
        return plan.steps * self.particles


def group_rows(values_M: np.ndarray, count: int) -> np.ndarray:
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
            f"the rewards gave no score for any of the {known_BN.shape[1]} candidates of picture"
            f" {int(empty[0]) + 1}",
            x,
        )


def take(x: torch.Tensor, index_B: np.ndarray, count: int) -> torch.Tensor:
    """Row b * count + index_B[b] of each group of ``count`` rows."""
    return x[torch.from_numpy(np.arange(len(index_B)) * count + index_B)]


def best_updates(updates: Sequence[tuple[np.ndarray, torch.Tensor]]) -> torch.Tensor:
    """(B, ...) the latents with the best reward of all updates, each row for itself; ``updates``
    are ((B,) rewards, (B, ...) latents)."""
    values_UB = np.array([rewards_B for rewards_B, _ in updates])
    best_B = np.where(np.isfinite(values_UB), values_UB, -np.inf).argmax(axis=0)
    return torch.stack([updates[int(u)][1][b] for b, u in enumerate(best_B)])


def per_row(values_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) values in a shape that broadcasts over the rows of ``like``."""
    return values_B.reshape(-1, *([1] * (like.ndim - 1)))


def of_swarm(swarm: Swarm, keep: Literal["best", "weighted"]) -> Result:
    """One particle of each picture, with the lineage of all."""
    return Result(
        latents=take(swarm.x, swarm.choose(keep), swarm.count),
        series={"effective sample size": tuple(swarm.sizes)},
        roots_BN=swarm.roots_BN,
        log_evidence_B=swarm.log_evidence_B,
    )
