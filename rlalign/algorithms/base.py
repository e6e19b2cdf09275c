"""What an algorithm is: it makes a batch of scored samples and gives a loss on slices of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from rlalign.advantages import PromptStatistics
from rlalign.policies.base import Policy
from rlalign.records import Batch, Scored, StepBatch, StepPass
from rlalign.registry import Recipe


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a pass gives the learner."""

    value: torch.Tensor
    """Scalar: the mean over the pass."""
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Metric -> scalar mean over the pass; the learner averages them by weight."""
    maxima: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Metric -> scalar maximum over the pass; the learner takes the largest."""


class Algorithm(Recipe):
    """Base of an algorithm: settings, what it eats, how the batch is made, and the loss."""

    shelf: ClassVar[str] = "algorithms"
    eats: ClassVar[Literal["steps", "images", "pairs", "prompts"]] = "steps"

    @property
    def ratio_limit(self) -> float | None:
        """Largest |ratio - 1| before the first update that a run accepts; None when no ratio is used."""
        return None

    @property
    def strictly_on_policy(self) -> bool:
        """Whether the loss is right for the first update after a rollout only."""
        return False

    def make_batch(self, scored: Sequence[Scored], statistics: PromptStatistics) -> Batch:
        """The batch of one round. ``statistics`` is the run's memory; it may be changed."""
        raise NotImplementedError

    def loss(self, batch: StepPass, policy: Policy) -> Loss:
        """The loss of one pass, with gradients into the policy's trainable weights."""
        raise NotImplementedError


def rewards_of(scored: Sequence[Scored]) -> tuple[np.ndarray, list[int]]:
    """(B,) float32 weighted totals of a round in unit order (NaN: dropped), and the prompt id of each."""
    return np.concatenate([s.total_B for s in scored]), [p for s in scored for p in s.unit.prompt_ids]


def step_batch(scored: Sequence[Scored], advantage_B: np.ndarray, *, skip_last: int = 0) -> StepBatch:
    """Denoising steps of a round with these advantages. Arrays are cloned: they may be shared memory.

    The last ``skip_last`` steps are left out of the loss, as if they were deterministic.
    """
    trajectories = [s.trajectory for s in scored]
    assert all(t is not None for t in trajectories), "a step batch needs trajectories"
    kept = [t for t in trajectories if t is not None]
    bounds = np.cumsum([len(s.unit.prompts) for s in scored])[:-1]
    return StepBatch(
        units=tuple(t.unit for t in kept),
        latents=tuple(torch.from_numpy(np.array(t.latents_BK1, dtype=np.float32)) for t in kept),
        log_prob=tuple(torch.from_numpy(np.array(t.log_prob_BK)) for t in kept),
        stochastic=tuple(_learned(t.stochastic_K, skip_last) for t in kept),
        advantage=tuple(torch.from_numpy(a.astype(np.float32)) for a in np.split(advantage_B, bounds)),
    )


def _learned(stochastic_K: np.ndarray, skip_last: int) -> torch.Tensor:
    learned_K = torch.from_numpy(np.array(stochastic_K))
    if skip_last:
        learned_K[-skip_last:] = False
    return learned_K
