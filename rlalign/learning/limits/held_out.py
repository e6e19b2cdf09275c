"""A held-out reward that falls below its best while the trained one rises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.learning.limits.base import Limit


class HeldOut(Limit):
    """The held-out reward is more than ``drop`` below its best, while the trained total is above
    what it was then.

    An evaluation in which either has no number (every sample was dropped) is no best.

    Source: Gao, Schulman & Hilton 2023, arXiv:2210.10760 (a proxy reward rises while the gold
    reward falls).
    """

    reward: str = Field(min_length=1, description="the held-out reward, by its name in metrics")
    drop: float = Field(
        default=0.05, ge=0, description="how far it may fall below its best, in its own units"
    )

    def refuse_unmeasured(self, place: str, held_out: Sequence[str], plan: Plan) -> None:
        if self.reward not in held_out:
            raise UserError(
                f"{place}.reward must be one of evaluate.rewards ({', '.join(held_out) or 'none'}),"
                f" got {self.reward!r}; add it there"
            )

    def find_missing(self, summary: Mapping[str, float]) -> str:
        trained, held_out = self._scores(summary)
        if math.isfinite(trained) and math.isfinite(held_out):
            return ""
        return (
            f"the trained reward is {trained:g} and the held-out reward {self.reward} {held_out:g}"
        )

    def observe(self, summary: Mapping[str, float], seen: dict[str, Any]) -> str:
        trained, held_out = self._scores(summary)
        best = seen.get("best")
        if best is None or held_out > best[0]:
            seen["best"] = best = [held_out, trained]
        best_held_out, trained_then = best
        if not (held_out < best_held_out - self.drop and trained > trained_then):
            return ""
        return (
            f"the held-out reward {self.reward} is {held_out:.3f}, its best was"
            f" {best_held_out:.3f}, while the trained reward rose from {trained_then:.3f} to"
            f" {trained:.3f}"
        )

    def _scores(self, summary: Mapping[str, float]) -> tuple[float, float]:
        """Means of the trained total and of the held-out reward."""
        return summary["reward/total/mean"], summary[f"held_out/{self.reward}/mean"]
