"""Starts, and goals, of a double integrator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from rlalign.data.double_integrator import state_prompt
from rlalign.data.prompts.base import Prompts, first_of
from rlalign.diffusion.noise import generator

COUNT = 1024
"""Prompts that are trained on."""
_HELD_OUT = 256
_FARTHEST = (2.0, 1.0)  # metres, m/s


class States(Prompts):
    """Starts of a double integrator, such as "from 1.20 at -0.50" (metres, m/s), and with ``goals``
    where it is to end; those for evaluation are others.

    Each prompt has a record with "start", and "goal".

    Source: rlalign's own task, ``rlalign/data/double_integrator.py``.
    """

    goals: bool = Field(default=False, description="a state to end in as well")
    limit: int = Field(
        default=0,
        ge=0,
        le=COUNT,
        description="train on a fixed choice of this many; 0 is all of them",
    )

    def pool(self) -> Sequence[str]:
        return _drawn("train", self.goals)[: self.limit or None]

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(_drawn("held_out", self.goals), count)


@lru_cache
def _drawn(split: str, goals: bool) -> tuple[str, ...]:
    """The prompts of a split, in a fixed order."""
    rng = generator("states", split)
    found: list[str] = []
    for _ in range(COUNT if split == "train" else _HELD_OUT):
        start, goal = (rng.uniform(-1.0, 1.0, (2, 2)) * _FARTHEST).round(2).tolist()
        found.append(state_prompt(start, goal if goals else None))
    return tuple(found)
