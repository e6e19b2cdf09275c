"""The guard against over-optimisation: a stated rule on a reward that is measured and never trained
on.

At each evaluation: where the held-out reward is more than ``drop`` below its best so far, while the
trained total is above what it was at that best, the evaluation counts against the run; any other
evaluation sets the count to 0. At ``patience`` counts the run stops, or its learning rate is halved
and the count starts again. An evaluation in which either reward has no number (every sample was
dropped) says nothing: it is no best, it does not count, and the count stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class GuardSettings(BaseModel):
    """When a run is held to be over-optimising, and what happens then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: str = Field(
        default="", description="title of the held-out reward to watch; empty is no guard"
    )
    drop: float = Field(
        default=0.05, ge=0, description="how far it may fall below its best, in its own units"
    )
    patience: int = Field(
        default=2, ge=1, description="evaluations in a row that must break the rule"
    )
    action: Literal["stop", "halve"] = Field(
        default="stop", description="end the run, or halve the learning rate"
    )


class Guard:
    """The rule's state; part of a checkpoint."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._best: tuple[float, float] | None = None
        self._count = 0
        self.rate = 1.0
        """Factor of the learning rate."""
        self.reason = ""

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return bool(self.reason)

    def observe(self, round: int, summary: Mapping[str, float]) -> str:
        """Takes in an evaluation's summary; returns what is to be said to the user, or nothing."""
        # a guard that has stopped the run says nothing more
        settings = self._settings
        if not settings.held_out or self.stopped:
            return ""
        trained = summary["reward/total/mean"]
        held_out = summary[f"held_out/{settings.held_out}/mean"]
        if not (math.isfinite(trained) and math.isfinite(held_out)):
            return (
                f"guard: after round {round} the trained reward is {trained:g} and the held-out"
                f" reward {settings.held_out} {held_out:g}; this evaluation is left out"
            )

        # the best so far, and how many evaluations in a row break the rule
        if self._best is None or held_out > self._best[0]:
            self._best = (held_out, trained)
        best, trained_then = self._best
        self._count = (
            self._count + 1 if held_out < best - settings.drop and trained > trained_then else 0
        )
        if self._count < settings.patience:
            return ""

        # it is broken often enough
        self._count = 0
        what = (
            f"guard: after round {round} the held-out reward {settings.held_out} is {held_out:.3f},"
            f" its best was {best:.3f}, while the trained reward rose from {trained_then:.3f} to"
            f" {trained:.3f}"
        )

        # a run stops only where the settings say so
        if settings.action == "stop":
            self.reason = what
            return f"{what}; the run stops"
        self.rate *= 0.5
        return f"{what}; the learning rate is now {self.rate:g} of its setting"

    def facts(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"best": self._best, "count": self._count, "rate": self.rate, "reason": self.reason}

    def load(self, facts: Mapping[str, Any]) -> None:
        """The inverse of ``facts``."""
        self._best = tuple(facts["best"]) if facts["best"] is not None else None
        self._count = facts["count"]
        self.rate = facts["rate"]
        self.reason = facts["reason"]
