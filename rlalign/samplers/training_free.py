"""Training-free guidance: clean-image gradients of the rewards, with the special cases of the field
as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.noise import noise_for
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import Gaussian
from rlalign.engine import Engine, Rewards, View, Work, join_views, pull_on, see
from rlalign.policies.base import Policy
from rlalign.samplers.base import NonNegative, Result, Sampler, per_row

Course = Literal["increase", "decrease", "constant"]


class TrainingFree(Sampler):
    """Each step follows the gradient of the reward of the clean sample seen: DPS, LGD, MPGD,
    FreeDoM, universal guidance.

    x_next = step(x) + (alpha_next / alpha) D + alpha_next D0, with D = rho * gradient of log mean
    exp of the reward around the clean sample, taken through the denoiser, and D0 of ``iterations``
    moves of size mu of the clean sample itself. rho alone is DPS, with ``draws`` LGD; mu alone is
    MPGD (no gradient through the denoiser); rho and ``recurrence`` FreeDoM; all three universal
    guidance. ``recurrence`` noises the next latent back and does the step again.

    Source: Ye 2024, arXiv:2409.15761 (TFG, algorithm 1); Chung 2022, arXiv:2209.14687 (DPS); He
    2023, arXiv:2311.16424 (MPGD); Yu 2023, arXiv:2303.09833 (FreeDoM); Bansal 2023,
    arXiv:2302.07121 (universal guidance).
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "recurrence"

    rho: NonNegative = Field(
        default=1.0, description="size of the move through the denoiser; 0 is none"
    )
    mu: NonNegative = Field(
        default=1.0, description="size of the moves of the clean sample; 0 is none"
    )
    rho_course: Course = Field(
        default="increase", description="how rho goes over the steps, mean 1"
    )
    mu_course: Course = Field(default="increase", description="how mu goes over the steps, mean 1")
    iterations: int = Field(default=1, ge=1, description="moves of the clean sample a step")
    draws: int = Field(
        default=1,
        ge=1,
        description="noisy copies of the clean sample that the reward is averaged over",
    )
    spread: NonNegative = Field(default=0.0, description="their noise, in sigma of the level")
    recurrence: int = Field(default=1, ge=1, description="times that each step is done")
    largest: NonNegative = Field(default=0.0, description="largest norm of a gradient; 0 is any")

    def sample(self, engine: Engine, unit: Unit) -> Result:
        steps = unit.plan.steps
        levels = schedule_of(engine.path, unit).levels
        rho_K, mu_K = (self._course(engine, unit, c) for c in (self.rho_course, self.mu_course))
        x = engine.begin(unit)
        rewards = []
        # every step as often as it recurs
        for k in range(steps):
            for turn in range(self.recurrence):
                sizes = (self.rho * rho_K[k], self.mu * mu_K[k])
                found: list[_MoveResult] = engine.each(
                    unit,
                    lambda some, cut, x=x, k=k, turn=turn, sizes=sizes: _Move(
                        unit=some,
                        x=x[cut],
                        k=k,
                        turn=turn,
                        rho=sizes[0],
                        mu=sizes[1],
                        settings=self,
                    ),
                )
                seen = join_views([f.seen for f in found])
                # the last turn has the plain sampler's noise
                if turn == self.recurrence - 1:
                    x = seen.next(unit, k)
                else:
                    x = self._back(engine, unit, _next(seen, unit, k, turn), levels, k, turn)
            total_B = np.concatenate([f.total_B for f in found])
            known = total_B[np.isfinite(total_B)].tolist()
            rewards.append(float(np.mean(known)) if known else float("nan"))
        return Result(latents=x, series={"reward of the clean sample seen": tuple(rewards)})

    def _course(self, engine: Engine, unit: Unit, course: Course) -> list[float]:
        levels = schedule_of(engine.path, unit).levels
        if course == "constant":
            return [1.0] * unit.plan.steps
        ratio = (engine.path.alpha(levels[:-1]) / engine.path.alpha(levels[1:])) ** 2
        values = ratio if course == "increase" else 1.0 - ratio
        return (values / values.mean()).tolist()

    def _back(
        self, engine: Engine, unit: Unit, x: torch.Tensor, levels: torch.Tensor, k: int, turn: int
    ) -> torch.Tensor:
        """From the next level back to step ``k``'s by the forward process, with noise of its
        own."""
        alpha, sigma = coefficients(engine.path, levels[k], x)
        alpha_next, sigma_next = coefficients(engine.path, levels[k + 1], x)
        keep = alpha / alpha_next
        spread = (sigma**2 - (keep * sigma_next) ** 2).clamp(min=0.0).sqrt()
        return keep * x + spread * _noise(unit, ("back", k, turn), x)

    def looks(self, plan: Plan) -> int:
        return plan.steps * self.recurrence

    def looks_back(self, plan: Plan) -> int:
        return self.looks(plan) if self.rho else 0


def _noise(unit: Unit, place: tuple[str | int, ...], like: torch.Tensor) -> torch.Tensor:
    return noise_for(unit, "training_free", place, like.shape[1:]).to(like)


def _next(seen: View, unit: Unit, k: int, turn: int) -> torch.Tensor:
    return seen.gaussian.sample(_noise(unit, ("next", k, turn), seen.clean))


class _MoveResult(NamedTuple):
    seen: View
    """With the moves in the Gaussian's mean."""
    total_B: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Move(Work):
    """One step with its two moves."""

    x: torch.Tensor
    k: int
    turn: int
    rho: float
    mu: float
    settings: TrainingFree

    def do(self, policy: Policy, rewards: Rewards) -> _MoveResult:
        schedule = schedule_of(policy.path, self.unit)
        levels = schedule_of(policy.path, self.unit).levels
        # both moves, each from its own gradient
        with torch.enable_grad():
            x = self.x.to(policy.device).detach().requires_grad_(self.rho > 0)
            found = see(policy, self.unit, schedule, self.k, x)
            total_B = np.full(len(x), np.nan)
            through = None
            clean = found.clean.detach()
            if self.rho:
                total_B, through = self._pull(policy, rewards, found.clean, x)
            for _ in range(self.settings.iterations if self.mu else 0):
                clean = clean.detach().requires_grad_()
                total_B, gradient = self._pull(policy, rewards, clean, clean)
                clean = clean + self.mu * gradient
        # added to the mean of the plain step
        with torch.no_grad():
            alpha, _ = coefficients(policy.path, levels[self.k], x)
            alpha_next, _ = coefficients(policy.path, levels[self.k + 1], x)
            mean = found.gaussian.mean.detach()
            # pure noise of the flow path says nothing
            if through is not None and float(alpha.reshape(-1)[0]) > 0:
                mean = mean + alpha_next / alpha * self.rho * through
            if self.mu:
                mean = mean + alpha_next * (clean.detach() - found.clean.detach())
        moved = found._replace(gaussian=Gaussian(mean=mean, std=found.gaussian.std))
        return _MoveResult(moved.to_cpu(), total_B)

    def _pull(
        self, policy: Policy, rewards: Rewards, clean: torch.Tensor, inputs: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor]:
        """((B,) log mean exp of the reward over noisy copies, its gradient with respect to
        ``inputs``, cut to ``largest``)."""
        settings = self.settings
        unit = self.unit
        levels = schedule_of(policy.path, unit).levels
        _, sigma = coefficients(policy.path, levels[self.k], clean)
        # the clean sample, or noisy copies of it
        copies = [clean]
        if settings.spread:
            noises = [
                _noise(unit, ("copy", self.k, self.turn, d), clean) for d in range(settings.draws)
            ]
            copies = [clean + settings.spread * sigma * noise for noise in noises]
        # the gradient of the log of their mean reward
        prompts = unit.prompts * len(copies)
        total_M, samples, pulls = pull_on(policy, rewards, torch.cat(copies), prompts)
        total_DB = torch.from_numpy(np.asarray(total_M, dtype=np.float64)).reshape(len(copies), -1)
        # a missing reward has no share
        known_DB = torch.where(total_DB.isfinite(), total_DB, -torch.inf)
        share_M = torch.softmax(known_DB, dim=0).nan_to_num().flatten()
        shares = [per_row(share_M.to(pull), pull) for pull in pulls]
        shared = [pull * share for pull, share in zip(pulls, shares, strict=True)]
        (gradient,) = torch.autograd.grad(samples, inputs, shared)
        if settings.largest:
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            gradient = gradient * per_row((settings.largest / norm).clamp(max=1.0), gradient)
        value_B = (torch.logsumexp(known_DB, dim=0) - np.log(len(copies))).numpy()
        return value_B, gradient
