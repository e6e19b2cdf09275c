"""What a limit is: a stated rule on the numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlalign.core.records import Plan
from rlalign.core.registry import Recipe


class Limit(Recipe):
    """Base of a limit. What it has to remember from one evaluation to the next is JSON-able, and
    kept by the guard in the run's checkpoints."""

    shelf: ClassVar[str] = "limits"

    def refuse_unmeasured(self, place: str, held_out: Sequence[str], plan: Plan) -> None:
        """Raises UserError, naming ``place``, where a run with these held-out rewards and this plan
        does not measure what is watched."""

    def find_missing(self, summary: Mapping[str, float]) -> str:
        """What an evaluation has no number of, without which it says nothing; empty where it has
        all."""
        return ""

    def observe(self, summary: Mapping[str, float], seen: dict[str, Any]) -> str:
        """How an evaluation crosses the limit; empty where it does not. ``seen`` is what earlier
        evaluations left, for this one to change."""
        raise NotImplementedError
