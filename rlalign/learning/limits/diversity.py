"""The diversity of the pictures, against that of the first evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from rlalign.learning.limits.base import Limit


class Diversity(Limit):
    """``diversity/pixel_rms`` is below a share of what it was at first.

    Source: rlalign's own measure, ``rlalign.learning.evaluate.pixel_diversity``.
    """

    least: float = Field(gt=0, lt=1, description="smallest share of the first evaluation's")

    def observe(self, summary: Mapping[str, float], seen: dict[str, Any]) -> str:
        found = summary["diversity/pixel_rms"]
        if seen.get("diversity") is None:
            seen["diversity"] = found
        first = seen["diversity"]
        if not found < self.least * first:
            return ""
        return (
            f"the diversity of the pictures is {found:.4g}, below {self.least:g} of the first"
            f" evaluation's {first:.4g}"
        )
