"""What is asked next: pairs to learn from, with gold pairs, repeats and shared pairs among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlalign.ballots.records import Item, Kind

Rule = Callable[[Sequence[Item], np.random.Generator], tuple[int, float, str]]
"""(items, generator) -> (index, probability, name of the rule)."""


def choose_random(items: Sequence[Item], rng: np.random.Generator) -> tuple[int, float, str]:
    """Any of the items, each with the same probability."""
    return int(rng.integers(len(items))), 1.0 / len(items), "random"


@dataclass(frozen=True, kw_only=True)
class Deal:
    """The usual dealer: each ballot's kind is drawn by stated shares.

    *Gold* pairs have a known answer, *repeats* ask a person's own pair again with its sides
    swapped, *shared* pairs are asked of several people; the rest is *live*. A kind of which nothing
    waits leaves its share to the others in proportion; without live pairs, shared ones take their
    place. ``rule`` chooses among live items alone: what measures people is drawn at random.
    """

    gold: float = 0.05
    repeat: float = 0.05
    shared: float = 0.10
    repeat_after: int = 8
    rule: Rule = field(default=choose_random)

    def __post_init__(self) -> None:
        shares = (self.gold, self.repeat, self.shared)
        assert min(shares) >= 0 and sum(shares) < 1, f"shares of ballots, got {shares}"

    def kind(self, available: Sequence[Kind], rng: np.random.Generator) -> tuple[Kind, float]:
        """One of the available kinds and its probability."""
        share = {"gold": self.gold, "repeat": self.repeat, "shared": self.shared}
        share["live"] = 1.0 - sum(share.values())
        if "live" not in available:
            share["shared"] += share["live"]
        weights = np.array([share[kind] for kind in available])
        if not weights.sum():  # shared pairs alone, with a share of 0
            weights = np.array([float(kind == "shared") for kind in available])
        weights = weights / weights.sum()
        index = int(rng.choice(len(available), p=weights))
        return available[index], float(weights[index])

    def pick(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[int, float, str]:
        """One of the items, all of one kind: (index, probability, rule)."""
        rule = self.rule if items[0].kind == "live" else choose_random
        return rule(items, rng)
