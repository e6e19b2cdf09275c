"""Training-free guidance: clean-image gradients of the rewards, with the special cases of the field as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from rlalign.diffusion.noise import normal
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.diffusion.steps import Gaussian
from rlalign.policies.base import Policy
from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, passes
from rlalign.work import Engine, Rewards, Seen, Work, see

Course = Literal["increase", "decrease", "constant"]


class TrainingFree(Sampler):
    """Each step follows the gradient of the reward of the clean sample seen: DPS, LGD, MPGD, FreeDoM, universal guidance.

    x_next = step(x) + (alpha_next / alpha) D + alpha_next D0, with D = rho * gradient of log mean exp of the reward around the
    clean sample, taken through the denoiser, and D0 of ``iterations`` moves of size mu of the clean sample itself.
    rho alone is DPS, with ``draws`` LGD; mu alone is MPGD (no gradient through the denoiser); rho and ``recurrence`` FreeDoM;
    all three universal guidance. ``recurrence`` noises the next latent back and does the step again.

    Source: Ye 2024, arXiv:2409.15761 (TFG, algorithm 1); Chung 2022, arXiv:2209.14687 (DPS); He 2023, arXiv:2311.16424 (MPGD);
    Yu 2023, arXiv:2303.09833 (FreeDoM); Bansal 2023, arXiv:2302.07121 (universal guidance).
    """

    needs_gradient: ClassVar[bool] = True
    width: ClassVar[str] = "recurrence"

    rho: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="size of the move through the denoiser; 0 is none"
    )
    mu: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="size of the moves of the clean sample; 0 is none"
    )
    rho_course: Course = Field(default="increase", description="how rho goes over the steps, mean 1")
    mu_course: Course = Field(default="increase", description="how mu goes over the steps, mean 1")
    iterations: int = Field(default=1, ge=1, description="moves of the clean sample a step")
    draws: int = Field(default=1, ge=1, description="noisy copies of the clean sample that the reward is averaged over")
    spread: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="their noise, in sigma of the level")
    recurrence: int = Field(default=1, ge=1, description="times that each step is done")
    largest: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="largest norm of a gradient; 0 is any")

    def sample(self, engine: Engine, unit: Unit) -> Found:
        steps, levels = unit.plan.steps, schedule_of(engine.path, unit).levels
        rho_K, mu_K = (self._course(engine, unit, c) for c in (self.rho_course, self.mu_course))
        x = engine.begin(unit)
        rewards = []
        for k in range(steps):
            for turn in range(self.recurrence):
                sizes = (self.rho * rho_K[k], self.mu * mu_K[k])
                found: list[_Moved] = engine.each(
                    unit,
                    lambda some, cut, x=x, k=k, turn=turn, sizes=sizes: _Move(
                        unit=some, x=x[cut], k=k, turn=turn, rho=sizes[0], mu=sizes[1], settings=self
                    ),
                )
                gaussian = Gaussian(
                    mean=torch.cat([f.seen.gaussian.mean for f in found]), std=found[0].seen.gaussian.std
                )
                seen = Seen(gaussian, torch.cat([f.seen.clean for f in found]), found[0].seen.noise)
                # the last turn has the plain sampler's noise
                reached = seen.next(unit, k) if turn == self.recurrence - 1 else _next(seen, unit, k, turn)
                if turn < self.recurrence - 1:
                    x = self._back(engine, unit, reached, levels, k, turn)
                else:
                    x = reached
            known = [v for f in found for v in f.total_B.tolist() if np.isfinite(v)]
            rewards.append(float(np.mean(known)) if known else float("nan"))
        return Found(latents=x, series={"reward of the clean sample seen": tuple(rewards)})

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
        """From the next level back to step ``k``'s by the forward process, with noise of its own."""
        alpha, sigma = coefficients(engine.path, levels[k], x)
        alpha_next, sigma_next = coefficients(engine.path, levels[k + 1], x)
        keep = alpha / alpha_next
        spread = (sigma**2 - (keep * sigma_next) ** 2).clamp(min=0.0).sqrt()
        return keep * x + spread * _noise(unit, ("back", k, turn), x.shape[1:]).to(x)

    def calls(self, plan: Plan) -> int:
        return passes(plan) * plan.steps * self.recurrence

    def backward(self, plan: Plan) -> int:
        return self.calls(plan) if self.rho else 0


def _noise(unit: Unit, purpose: tuple[str | int, ...], shape: torch.Size) -> torch.Tensor:
    key = unit.key
    rows = [
        normal(("training_free", unit.seed, key.stream, key.round, p, s, *purpose), shape)
        for p, s in zip(unit.prompt_ids, unit.sample_ids, strict=True)
    ]
    return torch.stack(rows)


def _next(seen: Seen, unit: Unit, k: int, turn: int) -> torch.Tensor:
    return seen.gaussian.sample(_noise(unit, ("next", k, turn), seen.clean.shape[1:]).to(seen.clean))


class _Moved(NamedTuple):
    seen: Seen
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

    def do(self, policy: Policy, rewards: Rewards) -> _Moved:
        schedule, levels = schedule_of(policy.path, self.unit), schedule_of(policy.path, self.unit).levels
        with torch.enable_grad():
            x = self.x.to(policy.device).detach().requires_grad_(self.rho > 0)
            found = see(policy, self.unit, schedule, self.k, x)
            total_B, through, clean = np.full(len(x), np.nan), None, found.clean.detach()
            if self.rho:
                total_B, through = self._pull(policy, rewards, found.clean, x)
            for _ in range(self.settings.iterations if self.mu else 0):
                clean = clean.detach().requires_grad_()
                total_B, gradient = self._pull(policy, rewards, clean, clean)
                clean = clean + self.mu * gradient
        with torch.no_grad():
            alpha, _ = coefficients(policy.path, levels[self.k], x)
            alpha_next, _ = coefficients(policy.path, levels[self.k + 1], x)
            mean = found.gaussian.mean.detach()
            if through is not None and float(alpha.reshape(-1)[0]) > 0:  # pure noise of the flow path says nothing
                mean = mean + alpha_next / alpha * self.rho * through
            if self.mu:
                mean = mean + alpha_next * (clean.detach() - found.clean.detach())
        gaussian = Gaussian(mean=mean.cpu(), std=found.gaussian.std.detach().cpu())
        return _Moved(Seen(gaussian, found.clean.detach().cpu(), found.noise.detach().cpu()), total_B)

    def _pull(
        self, policy: Policy, rewards: Rewards, clean: torch.Tensor, inputs: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor]:
        """((B,) log mean exp of the reward over noisy copies, its gradient with respect to ``inputs``, cut to ``largest``)."""
        settings, unit = self.settings, self.unit
        levels = schedule_of(policy.path, unit).levels
        _, sigma = coefficients(policy.path, levels[self.k], clean)
        copies = [
            clean + settings.spread * sigma * _noise(unit, ("copy", self.k, self.turn, d), clean.shape[1:]).to(clean)
            if settings.spread
            else clean
            for d in range(settings.draws if settings.spread else 1)
        ]
        media = policy.decode(torch.cat(copies))
        total_M, pull = rewards.gradient(media.detach(), unit.prompts * len(copies))
        total_DB = torch.from_numpy(np.asarray(total_M, dtype=np.float64)).reshape(len(copies), -1)
        share_M = torch.softmax(total_DB, dim=0).flatten().to(pull)
        (gradient,) = torch.autograd.grad(media, inputs, pull * share_M.reshape(-1, *([1] * (pull.ndim - 1))))
        if settings.largest:
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            gradient = gradient * (settings.largest / norm).clamp(max=1.0).reshape(-1, *([1] * (gradient.ndim - 1)))
        value_B = (torch.logsumexp(total_DB, dim=0) - np.log(len(copies))).numpy()
        return value_B, gradient
