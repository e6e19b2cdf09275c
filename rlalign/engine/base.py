"""A piece of work, who does it, and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from rlalign.core.records import Plan, Space, Unit
from rlalign.core.registry import UserError
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import NoisePath
from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a result took. Methods are compared at equal denoiser calls."""

    denoiser_calls: int = 0
    """Samples that the denoiser was asked about; a guided pass asks twice."""
    backward_calls: int = 0
    """Samples whose gradient went back through the denoiser; each takes about two calls' time."""
    reward_queries: int = 0
    """Pictures that a reward was asked about, times the rewards."""
    gradient_calls: int = 0
    """Pictures for which a reward, or a classifier, was asked for its gradient."""
    missing_scores: int = 0
    """Scores that failed or were not finite; their candidates were dropped."""
    seconds: float = 0.0
    """Work, summed over workers."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: mine + vars(other)[name] for name, mine in vars(self).items()})

    def __sub__(self, other: Cost) -> Cost:
        """What was spent between two readings."""
        return Cost(**{name: mine - vars(other)[name] for name, mine in vars(self).items()})


class Scores(NamedTuple):
    """What the rewards say of B pictures."""

    raw: Mapping[str, np.ndarray]
    """Title -> (B,) float32; NaN where a score is missing."""
    total_B: np.ndarray
    """(B,) float32 weighted sum of the rewards that are followed; NaN where one is missing."""
    seconds: Mapping[str, float] = MappingProxyType({})
    """Title -> how long it took, where that was measured."""


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of pieces, row after row."""
    raw = {}
    for title in parts[0].raw:
        raw[title] = np.concatenate([one.raw[title] for one in parts])
    return Scores(raw, np.concatenate([one.total_B for one in parts]))


class Rewards(Protocol):
    """The rewards of a run, wherever their scorers are."""

    queries: int
    """Pictures times rewards that were asked about so far."""
    gradients: int
    """Pictures whose gradient was asked for so far."""
    missing: int
    """Scores that failed or were not finite so far."""

    def spaces(self, *, held_out: bool = False) -> frozenset[Space]:
        """Where they see samples; with the held-out rewards too where asked for."""
        ...

    def scores(
        self,
        samples: Mapping[Space, torch.Tensor],
        prompts: Sequence[str],
        *,
        held_out: bool = False,
    ) -> Scores:
        """Scores of samples in (at least) ``spaces``, media in [0, 1] rounded to uint8; with the
        held-out rewards too where asked for."""
        ...

    def score_arrays(
        self, samples: Mapping[Space, np.ndarray], prompts: Sequence[str], *, held_out: bool = False
    ) -> Scores:
        """The same of uint8 media and float32 latents."""
        ...

    def gradient(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str]
    ) -> tuple[np.ndarray, dict[Space, torch.Tensor]]:
        """(B,) totals of samples in ``spaces`` as they are, and d total / d samples in each, which
        is finite: 0 where a total is missing.

        Raises UserError for a reward without gradients, or whose gradient is not finite.
        """
        ...


class NoScore(UserError):
    """No candidate of a picture has a score: the method cannot go on. It carries the latents so
    far."""

    def __init__(self, message: str, latents: torch.Tensor | None = None) -> None:
        super().__init__(message)
        self.latents = latents


@dataclass(frozen=True, kw_only=True)
class Work(ABC):
    """A piece of work on some rows; it pickles, and asks nothing of the process that does it."""

    explains_itself: ClassVar[bool] = False
    """Whether it names the part at fault by itself where a number is not finite."""
    parts: ClassVar[int] = 1
    """Objects that the result is on a cluster; where there are several it is a tuple of them. Each
    goes only where it is needed."""

    unit: Unit
    """The rows: prompts, and the keys of their noise."""

    @abstractmethod
    def do(self, policy: Policy, rewards: Rewards) -> Any:
        """The result, with tensors on the CPU."""


class WorkResult(NamedTuple):
    """A piece of work, done."""

    value: Any
    cost: Cost
    reason: str
    """What the last scorer that failed said; empty if none did."""


class Engine(ABC):
    """Does pieces of work: in this process, or on a pool."""

    path: NoisePath
    dtype: torch.dtype
    """Of latents: float32, or float64 for a policy that computes in it."""
    rows: int
    """Rows in a piece. Part of a result's identity: another number changes the last bits."""
    cost: Cost
    """Of everything done so far."""
    reason: str
    """What the last scorer that failed said; empty if none did."""

    @abstractmethod
    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of one sample's latent under a plan."""

    @abstractmethod
    def perform(self, works: Sequence[Work]) -> list[WorkResult]:
        """Does pieces of work; what became of them in order."""

    def map(self, works: Sequence[Work]) -> list[Any]:
        """The values of pieces in order; adds to ``cost``."""
        done = self.perform(works)
        self.cost = sum((d.cost for d in done), self.cost)
        self.reason = next((d.reason for d in reversed(done) if d.reason), self.reason)
        return [d.value for d in done]

    def begin(self, unit: Unit) -> torch.Tensor:
        """(B, C, H, W) the unit's starting noise."""
        return unit_noise(unit, 0, self.latent_shape(unit.plan)).to(self.dtype)

    def each(self, unit: Unit, make: Callable[[Unit, slice], Work]) -> list[Any]:
        """Cuts the unit's rows into pieces, has ``make`` turn each into work, and does them."""
        count = len(unit.prompts)
        cuts = [slice(i, min(i + self.rows, count)) for i in range(0, count, self.rows)]
        return self.map([make(unit.take(range(count)[cut]), cut) for cut in cuts])


CANDIDATE = 1 << 20
"""Sample ids of the candidates of one picture lie this far apart; candidate 0 has the picture's own
noise."""


def expand(unit: Unit, count: int) -> Unit:
    """The unit with ``count`` candidates in place of each row, side by side: row b * count + j is
    candidate j of row b."""
    rows = unit.take([row // count for row in range(len(unit.prompts) * count)])
    ids = tuple(s + i % count * CANDIDATE for i, s in enumerate(rows.sample_ids))
    return replace(rows, sample_ids=ids)
