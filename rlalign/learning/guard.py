"""The guard against over-optimisation: stated rules on what is measured and never trained on.

At each evaluation a rule is broken where

- the held-out reward is more than ``drop`` below its best so far, while the trained total is above
  what it was at that best;
- the KL to the pretrained model is above ``kl_most``;
- the diversity of the pictures is below ``diversity_least`` of what it was at first.

An evaluation that breaks a rule counts against the run; one that breaks none sets the count to 0.
At ``patience`` counts the run stops, or its learning rate is halved, or its KL weight doubled, and
the count starts again. An evaluation in which either reward has no number (every sample was
dropped) says nothing: it is no best, it does not count, and the count stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlalign.core.registry import Before


class GuardSettings(BaseModel):
    """When a run is held to be over-optimising, and what happens then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: str = Field(
        default="", description="title of the held-out reward to watch; empty is none"
    )
    drop: float = Field(
        default=0.05, ge=0, description="how far it may fall below its best, in its own units"
    )
    kl_most: Annotated[float, Before(0.0)] = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description=(
            "largest KL to the pretrained model, nats per latent element and step"
            " (kl/per_step_gaussian); 0 watches none"
        ),
    )
    diversity_least: Annotated[float, Before(0.0)] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="smallest share of the first evaluation's diversity; 0 watches none",
    )
    patience: int = Field(
        default=2, ge=1, description="evaluations in a row that must break a rule"
    )
    action: Literal["stop", "halve", "raise_kl"] = Field(
        default="stop",
        description="end the run, halve the learning rate, or double the algorithm's kl_weight",
    )

    @property
    def watches(self) -> bool:
        """Whether there is a rule."""
        return bool(self.held_out or self.kl_most or self.diversity_least)


class Guard:
    """The rules' state; part of a checkpoint."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._best: tuple[float, float] | None = None
        self._diversity: float | None = None
        self._count = 0
        self.rate = 1.0
        """Factor of the learning rate."""
        self.kl = 1.0
        """Factor of the algorithm's KL weight."""
        self.reason = ""

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return bool(self.reason)

    def observe(self, round: int, summary: Mapping[str, float]) -> str:
        """Takes in an evaluation's summary; returns what is to be said to the user, or nothing."""
        # a guard that has stopped the run says nothing more
        settings = self._settings
        if not settings.watches or self.stopped:
            return ""
        missing = self._missing(summary)
        if missing:
            return f"guard: after round {round} {missing}; this evaluation is left out"

        # how many evaluations in a row break a rule
        broken = [
            said
            for said in (self._falls(summary), self._is_far(summary), self._is_alike(summary))
            if said
        ]
        self._count = self._count + 1 if broken else 0
        if self._count < settings.patience:
            return ""

        # they are broken often enough; a run stops only where the settings say so
        self._count = 0
        what = f"guard: after round {round} {'; '.join(broken)}"
        if settings.action == "stop":
            self.reason = what
            return f"{what}; the run stops"
        if settings.action == "raise_kl":
            self.kl *= 2.0
            return f"{what}; the KL weight is now {self.kl:g} times its setting"
        self.rate *= 0.5
        return f"{what}; the learning rate is now {self.rate:g} of its setting"

    def _missing(self, summary: Mapping[str, float]) -> str:
        """What there is no number of; empty where the held-out reward is not watched."""
        title = self._settings.held_out
        if not title:
            return ""
        trained = summary["reward/total/mean"]
        held_out = summary[f"held_out/{title}/mean"]
        if math.isfinite(trained) and math.isfinite(held_out):
            return ""
        return f"the trained reward is {trained:g} and the held-out reward {title} {held_out:g}"

    def _falls(self, summary: Mapping[str, float]) -> str:
        """How the held-out reward falls while the trained one rises; empty where it does not."""
        title = self._settings.held_out
        if not title:
            return ""
        trained = summary["reward/total/mean"]
        held_out = summary[f"held_out/{title}/mean"]
        if self._best is None or held_out > self._best[0]:
            self._best = (held_out, trained)
        best, trained_then = self._best
        if not (held_out < best - self._settings.drop and trained > trained_then):
            return ""
        return (
            f"the held-out reward {title} is {held_out:.3f}, its best was {best:.3f}, while the"
            f" trained reward rose from {trained_then:.3f} to {trained:.3f}"
        )

    def _is_far(self, summary: Mapping[str, float]) -> str:
        """How far the policy is from the pretrained model; empty where it is near enough."""
        most = self._settings.kl_most
        if not most or not summary["kl/per_step_gaussian"] > most:
            return ""
        found = summary["kl/per_step_gaussian"]
        return f"the KL to the pretrained model is {found:.4g}, above {most:g}"

    def _is_alike(self, summary: Mapping[str, float]) -> str:
        """How much diversity is left; empty where it is enough. The first evaluation sets the
        measure."""
        least = self._settings.diversity_least
        found = summary["diversity/pixel_rms"] if least else 0.0
        if self._diversity is None:
            self._diversity = found
        if not least or not found < least * self._diversity:
            return ""
        return (
            f"the diversity of the pictures is {found:.4g}, below {least:g} of the first"
            f" evaluation's {self._diversity:.4g}"
        )

    def facts(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "best": self._best,
            "diversity": self._diversity,
            "count": self._count,
            "rate": self.rate,
            "kl": self.kl,
            "reason": self.reason,
        }

    def load(self, facts: Mapping[str, Any]) -> None:
        """The inverse of ``facts``."""
        self._best = tuple(facts["best"]) if facts["best"] is not None else None
        self._diversity = facts.get("diversity")
        self._count = facts["count"]
        self.rate = facts["rate"]
        self.kl = facts.get("kl", 1.0)
        self.reason = facts["reason"]
