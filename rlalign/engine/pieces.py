"""The common pieces: steps of a chain, a look at the clean picture, its score, and the gradient of
its score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from rlalign.core.media import as_arrays
from rlalign.core.records import MEDIA, Space, Trajectory, Unit
from rlalign.core.turns import waited_seconds
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.rollout import Schedule, advance, denoise_unit, denoised, schedule_of
from rlalign.diffusion.steps import Gaussian, Move, ddim
from rlalign.engine.base import Engine, Rewards, Scores, Work, join_scores
from rlalign.policies.base import Policy


class Position(NamedTuple):
    """Where a chain is."""

    x: torch.Tensor
    """(B, C, H, W) latents."""
    clean: torch.Tensor
    """(B, C, H, W) the clean sample that the policy saw in the last latent before."""


class View(NamedTuple):
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

    def take(self, rows: np.ndarray) -> View:
        """What was seen in these rows."""
        index = torch.from_numpy(rows)
        total_B = self.total_B[rows] if self.total_B is not None else None
        return View(self.gaussian.take(index), self.clean[index], self.noise[index], total_B)

    def to_cpu(self) -> View:
        """The same on the CPU, without a graph."""
        return View(
            self.gaussian.to_cpu(),
            self.clean.detach().cpu(),
            self.noise.detach().cpu(),
            self.total_B,
        )


def join_views(parts: Sequence[View]) -> View:
    """What was seen in pieces, row after row."""
    means = torch.cat([one.gaussian.mean for one in parts])
    totals = [one.total_B for one in parts if one.total_B is not None]
    return View(
        Gaussian(mean=means, std=parts[0].gaussian.std),
        torch.cat([one.clean for one in parts]),
        torch.cat([one.noise for one in parts]),
        np.concatenate(totals) if totals else None,
    )


def see(policy: Policy, unit: Unit, schedule: Schedule, k: int, x: torch.Tensor) -> View:
    """One look of the policy at step ``k``; gradients pass where they are wanted."""
    condition = policy.encode(unit.prompts, unit.plan)
    levels = schedule.levels
    found = denoised(policy, x, levels[k], levels[k + 1], condition, unit.plan, schedule.eta_K[k])
    return View(found.gaussian, found.clean, found.noise)


@dataclass(frozen=True, kw_only=True)
class Advance(Work):
    """Steps ``start`` to ``stop`` (not included) of the plan with the unit's own noise: rollout's
    own arithmetic."""

    x: torch.Tensor
    """Latents at ``start``."""
    start: int = 0
    stop: int

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Position:
        unit = self.unit
        condition = policy.encode(unit.prompts, unit.plan)
        schedule = schedule_of(policy.path, unit)
        x = self.x.to(policy.device)
        clean = x
        for k in range(self.start, self.stop):
            found, x = advance(policy, unit, schedule, k, x, condition)
            clean = found.clean
        return Position(x.cpu(), clean.cpu())


@dataclass(frozen=True, kw_only=True)
class ScoredAdvance(Advance):
    """The same with scores of the latents at the plan's end, and before it of the clean samples: of
    one piece they are asked for while the next one is made."""

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Any:
        """(Position, Scores)."""
        reached = super().do(policy, rewards)
        ended = self.stop == self.unit.plan.steps
        clean = (reached.x if ended else reached.clean).to(policy.device)
        samples = policy.show(clean, rewards.spaces())
        return reached, rewards.scores(samples, self.unit.prompts)


@dataclass(frozen=True, kw_only=True)
class Look(Work):
    """What the policy sees at step ``k``, with the reward of the clean sample where asked for."""

    x: torch.Tensor
    k: int
    score: bool = False

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> View:
        schedule = schedule_of(policy.path, self.unit)
        seen = see(policy, self.unit, schedule, self.k, self.x.to(policy.device))
        if self.score:
            samples = policy.show(seen.clean, rewards.spaces())
            scores = rewards.scores(samples, self.unit.prompts)
            seen = seen._replace(total_B=scores.total_B)
        return seen.to_cpu()


@dataclass(frozen=True, kw_only=True)
class Score(Work):
    """Scores of latents at step ``k``: as they are at the last, and before it where a chain without
    noise takes them.

    ``steps`` bounds the steps of that chain; 1 is the clean sample that one look sees.
    """

    x: torch.Tensor
    k: int
    steps: int = 1
    held_out: bool = False

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Scores:
        clean = endpoint(policy, self.unit, self.x.to(policy.device), self.k, self.steps)
        samples = policy.show(clean, rewards.spaces(held_out=self.held_out))
        return rewards.scores(samples, self.unit.prompts, held_out=self.held_out)


@dataclass(frozen=True, kw_only=True)
class Rollout(Work):
    """A unit of a round: its whole chain, with what learning from it needs."""

    explains_itself: ClassVar[bool] = True
    parts: ClassVar[int] = 2

    version: int
    """Of the weights that it is made with."""
    spaces: frozenset[Space] = MEDIA
    """Where its samples are wanted: decoded, where anybody sees media, and as latents."""

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> Any:
        """(Trajectory, space -> samples: media uint8 BFCHW, latents float32)."""
        trajectory, clean = denoise_unit(policy, self.unit, self.version)
        return trajectory, as_arrays(policy.show(clean, self.spaces))


class Produced(NamedTuple):
    """A unit of a round, scored."""

    trajectory: Trajectory
    samples: Mapping[Space, np.ndarray]
    scores: Scores
    seconds: Mapping[str, float]
    """Phase ("rollout", "reward") -> seconds of work; "reward/TITLE" -> those of one reward."""


@dataclass(frozen=True, kw_only=True)
class Produce(Rollout):
    """The same with its scores, by whoever has the rewards beside the policy."""

    parts: ClassVar[int] = 1

    def do(self, policy: Policy, rewards: Rewards) -> Produced:
        start = time.monotonic() - waited_seconds()
        trajectory, samples = super().do(policy, rewards)
        middle = time.monotonic() - waited_seconds()
        held_out = self.unit.key.stream == "evaluate"
        scores = rewards.score_arrays(samples, self.unit.prompts, held_out=held_out)
        seconds = {
            "rollout": middle - start,
            "reward": time.monotonic() - waited_seconds() - middle,
        }
        seconds |= {f"reward/{title}": s for title, s in scores.seconds.items()}
        return Produced(trajectory, samples, scores, seconds)


@dataclass(frozen=True, kw_only=True)
class Pictures(Rollout):
    """A unit's pictures alone."""

    parts: ClassVar[int] = 1

    def do(self, policy: Policy, rewards: Rewards) -> np.ndarray:
        """Media uint8 BFCHW."""
        return super().do(policy, rewards)[1]["media"]


class Description(NamedTuple):
    """What has to be known of a policy to begin a chain."""

    path: NoisePath
    dtype: torch.dtype
    """Of latents."""
    latent_shape: tuple[int, ...]
    """Of one sample under the plan."""


@dataclass(frozen=True, kw_only=True)
class Describe(Work):
    """What the policy is to the unit's plan."""

    def do(self, policy: Policy, rewards: Rewards) -> Description:
        return Description(policy.path, latent_dtype(policy), policy.latent_shape(self.unit.plan))


def latent_dtype(policy: Policy) -> torch.dtype:
    """Of latents: float32, or float64 for a policy that computes in it."""
    return torch.promote_types(torch.float32, next(policy.network.parameters()).dtype)


def endpoint(policy: Policy, unit: Unit, x: torch.Tensor, k: int, steps: int) -> torch.Tensor:
    """Where the probability-flow ODE takes latents at step ``k`` of the plan, in at most ``steps``
    steps of its grid.

    The last of them goes to the clean sample itself, as one look does (``steps`` 1).
    """
    levels = schedule_of(policy.path, unit).levels
    plan = unit.plan
    left = plan.steps - k
    if left <= 0:
        return x
    stops = np.unique(np.round(np.linspace(k, plan.steps, min(steps, left) + 1)).astype(int))
    condition = policy.encode(unit.prompts, unit.plan)
    for here, there in zip(stops[:-1].tolist(), stops[1:].tolist(), strict=True):
        clean, noise = policy.denoise(x, levels[here], condition, plan.guidance)
        if there == plan.steps:
            x = clean
        else:
            move = Move(x, clean, noise, policy.path, levels[here], levels[there], 0.0)
            x = ddim(move).mean
    return x


def reward_gradient(
    policy: Policy,
    rewards: Rewards,
    clean: torch.Tensor,
    prompts: Sequence[str],
    inputs: torch.Tensor,
) -> tuple[np.ndarray, torch.Tensor]:
    """((B,) totals, gradient of the total of the samples ``clean`` with respect to ``inputs`` that
    they were made from)."""
    total_B, samples, pulls = pull_on(policy, rewards, clean, prompts)
    (gradient,) = torch.autograd.grad(samples, inputs, pulls)
    return total_B, gradient


def pull_on(
    policy: Policy, rewards: Rewards, clean: torch.Tensor, prompts: Sequence[str]
) -> tuple[np.ndarray, list[torch.Tensor], list[torch.Tensor]]:
    """((B,) totals of the samples ``clean``, these where the rewards see them, d total / d each).

    The rewards give the latter, wherever they are; the decoder and what is before it are
    differentiated by whoever asks.
    """
    samples = policy.show(clean, rewards.spaces())
    seen: dict[Space, torch.Tensor] = {s: v.detach() for s, v in samples.items()}
    total_B, pulls = rewards.gradient(seen, prompts)
    return total_B, list(samples.values()), [pulls[s].to(v) for s, v in samples.items()]


# --- the same on all rows of a unit --------------------------------------------------------------


def advance_rows(
    engine: Engine, unit: Unit, x: torch.Tensor | None, start: int, stop: int
) -> Position:
    """``Advance`` on every row, in pieces; from the unit's noise where ``x`` is None."""
    begun = x if x is not None else engine.begin(unit)
    found: list[Position] = engine.each(
        unit, lambda some, cut: Advance(unit=some, x=begun[cut], start=start, stop=stop)
    )
    return Position(torch.cat([f.x for f in found]), torch.cat([f.clean for f in found]))


def advance_and_score_rows(
    engine: Engine, unit: Unit, x: torch.Tensor | None, start: int, stop: int
) -> tuple[Position, Scores]:
    """``ScoredAdvance`` on every row, in pieces."""
    begun = x if x is not None else engine.begin(unit)
    found: list[tuple[Position, Scores]] = engine.each(
        unit, lambda some, cut: ScoredAdvance(unit=some, x=begun[cut], start=start, stop=stop)
    )
    reached = [position for position, _ in found]
    position = Position(torch.cat([r.x for r in reached]), torch.cat([r.clean for r in reached]))
    return position, join_scores([scores for _, scores in found])


def look_rows(engine: Engine, unit: Unit, x: torch.Tensor, k: int, *, score: bool = False) -> View:
    """``Look`` on every row, in pieces."""
    return join_views(
        engine.each(unit, lambda some, cut: Look(unit=some, x=x[cut], k=k, score=score))
    )


def score_rows(
    engine: Engine, unit: Unit, x: torch.Tensor, k: int, *, steps: int = 1, held_out: bool = False
) -> Scores:
    """``Score`` on every row, in pieces."""
    return join_scores(
        engine.each(
            unit, lambda some, cut: Score(unit=some, x=x[cut], k=k, steps=steps, held_out=held_out)
        )
    )
