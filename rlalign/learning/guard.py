"""The guard against over-optimisation: stated limits on what is measured and never trained on.

An evaluation that crosses a limit (``rlalign/learning/limits/``) counts against the run; one that
crosses none sets the count to 0. At ``patience`` counts the run stops, or its learning rate is
halved, or its KL weight doubled, and the count starts again. An evaluation in which a watched
reward has no number (every sample was dropped) says nothing: it does not count, and the count
stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

from rlalign.core.registry import plugin_field
from rlalign.learning.limits.base import Limit

_Limit = Annotated[Limit, plugin_field("limits", "guard.limits")]


class GuardSettings(BaseModel):
    """When a run is held to be over-optimising, and what happens then."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: tuple[SerializeAsAny[_Limit], ...] = Field(
        default=(), description="what is watched at each evaluation"
    )
    patience: int = Field(
        default=2, ge=1, description="evaluations in a row that must cross a limit"
    )
    action: Literal["stop", "halve", "raise_kl"] = Field(
        default="stop",
        description="end the run, halve the learning rate, or double the algorithm's kl_weight",
    )


class Guard:
    """The limits' state; part of a checkpoint."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._seen: list[dict[str, Any]] = [{} for _ in settings.limits]
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
        limits = self._settings.limits
        if not limits or self.stopped:
            return ""
        missing = next(filter(None, (limit.find_missing(summary) for limit in limits)), "")
        if missing:
            return f"guard: after round {round} {missing}; this evaluation is left out"

        # how many evaluations in a row cross a limit
        crossed = [
            limit.observe(summary, seen) for limit, seen in zip(limits, self._seen, strict=True)
        ]
        crossed = [said for said in crossed if said]
        self._count = self._count + 1 if crossed else 0
        if self._count < self._settings.patience:
            return ""

        # they do so often enough; a run stops only where the settings say so
        self._count = 0
        what = f"guard: after round {round} {'; '.join(crossed)}"
        if self._settings.action == "stop":
            self.reason = what
            return f"{what}; the run stops"
        if self._settings.action == "raise_kl":
            self.kl *= 2.0
            return f"{what}; the KL weight is now {self.kl:g} times its setting"
        self.rate *= 0.5
        return f"{what}; the learning rate is now {self.rate:g} of its setting"

    def facts(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "seen": self._seen,
            "count": self._count,
            "rate": self.rate,
            "kl": self.kl,
            "reason": self.reason,
        }

    def load(self, facts: Mapping[str, Any]) -> None:
        """The inverse of ``facts``."""
        # checkpoints of before a guard had a list of limits name what each of them has seen
        earlier = {name: facts.get(name) for name in ("best", "diversity")}
        seen = facts.get("seen", [earlier] * len(self._seen))
        self._seen = [dict(one) for one in seen]
        self._count = facts["count"]
        self.rate = facts["rate"]
        self.kl = facts.get("kl", 1.0)
        self.reason = facts["reason"]
