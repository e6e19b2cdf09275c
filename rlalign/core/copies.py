"""Copies of the trained weights that an algorithm keeps beside the policy: when each is taken.

An algorithm declares them by name (``Algorithm.copies``); the learner keeps them, a checkpoint
holds those that outlive a round, and ``rlalign check`` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Decay:
    """A slow copy: d * copy + (1 - d) * weights after each round. It starts as the weights."""

    of_round: Callable[[int], float]
    """Round >= 1 -> d in [0, 1]."""


@dataclass(frozen=True)
class Every:
    """The weights after every so many rounds; before the first time there is no copy."""

    rounds: int
    """>= 1."""


@dataclass(frozen=True)
class AtRoundStart:
    """The weights that a round's updates start from. Not part of a checkpoint."""


Copy = Decay | Every | AtRoundStart
