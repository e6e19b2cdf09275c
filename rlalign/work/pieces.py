"""The common pieces: steps of a chain, a look at the clean picture, its score, and the gradient of its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import Schedule, advance, denoised, schedule_of
from rlalign.diffusion.steps import Gaussian, ddim
from rlalign.policies.base import Policy
from rlalign.records import Unit
from rlalign.work.base import Engine, Rewards, Scores, Work


class Reached(NamedTuple):
    """Where a chain is."""

    x: torch.Tensor
    """(B, C, H, W) latents."""
    clean: torch.Tensor
    """(B, C, H, W) the clean sample that the policy saw in the last latent before."""


class Seen(NamedTuple):
    """What the policy sees at a step of the plan, and what the rewards say of it."""

    gaussian: Gaussian
    """Of the next latent, under the plan's rule."""
    clean: torch.Tensor
    noise: torch.Tensor
    total_B: np.ndarray | None = None
    """(B,) score of the decoded clean sample, where asked for."""

    def next(self, unit: Unit, k: int) -> torch.Tensor:
        """The next latent with the unit's own noise of step ``k``."""
        if not bool((self.gaussian.std > 0).any()):
            return self.gaussian.mean
        return self.gaussian.sample(unit_noise(unit, k + 1, self.clean.shape[1:]).to(self.clean))


def see(policy: Policy, unit: Unit, schedule: Schedule, k: int, x: torch.Tensor) -> Seen:
    """One look of the policy at step ``k``; gradients pass where they are wanted."""
    condition, levels = policy.encode(unit.prompts), schedule.levels
    found = denoised(policy, x, levels[k], levels[k + 1], condition, unit.plan, schedule.eta_K[k])
    return Seen(found.gaussian, found.clean, found.noise)


@dataclass(frozen=True, kw_only=True)
class Advance(Work):
    """Steps ``start`` to ``stop`` (not included) of the plan with the unit's own noise: rollout's own arithmetic."""

    x: torch.Tensor
    """Latents at ``start``."""
    start: int = 0
    stop: int

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Reached:
        unit = self.unit
        condition, schedule = policy.encode(unit.prompts), schedule_of(policy.path, unit)
        x = self.x.to(policy.device)
        clean = x
        for k in range(self.start, self.stop):
            found, x = advance(policy, unit, schedule, k, x, condition)
            clean = found.clean
        return Reached(x.cpu(), clean.cpu())


@dataclass(frozen=True, kw_only=True)
class Look(Work):
    """What the policy sees at step ``k``, with the reward of the clean sample where asked for."""

    x: torch.Tensor
    k: int
    score: bool = False

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Seen:
        schedule = schedule_of(policy.path, self.unit)
        found = see(policy, self.unit, schedule, self.k, self.x.to(policy.device))
        total_B = rewards.scores(policy.decode(found.clean), self.unit.prompts).total_B if self.score else None
        gaussian = Gaussian(mean=found.gaussian.mean.cpu(), std=found.gaussian.std.cpu())
        return Seen(gaussian, found.clean.cpu(), found.noise.cpu(), total_B)


@dataclass(frozen=True, kw_only=True)
class Score(Work):
    """Scores of latents at step ``k``: decoded as they are at the last, and before it where a chain without noise takes them.

    ``steps`` bounds the steps of that chain; 1 is the clean sample that one look sees.
    """

    x: torch.Tensor
    k: int
    steps: int = 1
    held_out: bool = False

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Scores:
        clean = endpoint(policy, self.unit, self.x.to(policy.device), self.k, self.steps)
        return rewards.scores(policy.decode(clean), self.unit.prompts, held_out=self.held_out)


def endpoint(policy: Policy, unit: Unit, x: torch.Tensor, k: int, steps: int) -> torch.Tensor:
    """Where the probability-flow ODE takes latents at step ``k`` of the plan, in at most ``steps`` steps of its grid.

    The last of them goes to the clean sample itself, as one look does (``steps`` 1).
    """
    levels, plan = schedule_of(policy.path, unit).levels, unit.plan
    left = plan.steps - k
    if left <= 0:
        return x
    stops = np.unique(np.round(np.linspace(k, plan.steps, min(steps, left) + 1)).astype(int))
    condition = policy.encode(unit.prompts)
    for here, there in zip(stops[:-1].tolist(), stops[1:].tolist(), strict=True):
        clean, noise = policy.denoise(x, levels[here], condition, plan.guidance)
        x = clean
        if there != plan.steps:
            x = ddim(x, clean, noise, policy.path, levels[here], levels[there], 0.0).mean
    return x


def reward_gradient(
    policy: Policy, rewards: Rewards, clean: torch.Tensor, prompts: Sequence[str], inputs: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    """((B,) totals, gradient of the total of the decoded ``clean`` with respect to ``inputs`` that it was made from).

    The reward gives d total / d picture, wherever it is; the decoder and what is before it are differentiated here.
    """
    media = policy.decode(clean)
    total_B, pull = rewards.gradient(media.detach(), prompts)
    (gradient,) = torch.autograd.grad(media, inputs, pull.to(media))
    return total_B, gradient


# --- the same on all rows of a unit ----------------------------------------------------------------------------------------


def advance_rows(engine: Engine, unit: Unit, x: torch.Tensor | None, start: int, stop: int) -> Reached:
    """``Advance`` on every row, in pieces; from the unit's noise where ``x`` is None."""
    begun = x if x is not None else engine.begin(unit)
    found: list[Reached] = engine.each(unit, lambda some, cut: Advance(unit=some, x=begun[cut], start=start, stop=stop))
    return Reached(torch.cat([f.x for f in found]), torch.cat([f.clean for f in found]))


def look_rows(engine: Engine, unit: Unit, x: torch.Tensor, k: int, *, score: bool = False) -> Seen:
    """``Look`` on every row, in pieces."""
    found: list[Seen] = engine.each(unit, lambda some, cut: Look(unit=some, x=x[cut], k=k, score=score))
    totals = [f.total_B for f in found if f.total_B is not None]
    return Seen(
        Gaussian(mean=torch.cat([f.gaussian.mean for f in found]), std=found[0].gaussian.std),
        torch.cat([f.clean for f in found]),
        torch.cat([f.noise for f in found]),
        np.concatenate(totals) if totals else None,
    )


def score_rows(
    engine: Engine, unit: Unit, x: torch.Tensor, k: int, *, steps: int = 1, held_out: bool = False
) -> Scores:
    """``Score`` on every row, in pieces."""
    found: list[Scores] = engine.each(
        unit, lambda some, cut: Score(unit=some, x=x[cut], k=k, steps=steps, held_out=held_out)
    )
    titles = list(found[0].raw)
    raw = {title: np.concatenate([f.raw[title] for f in found]) for title in titles}
    return Scores(raw, np.concatenate([f.total_B for f in found]))
