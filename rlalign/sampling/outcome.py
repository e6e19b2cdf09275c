"""What one method came to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlalign.engine import Cost, Scores
from rlalign.learning.evaluate import pixel_diversity, win_rate
from rlalign.samplers.base import Result, Sampler
from rlalign.sampling.settings import Sample


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method's pictures, with what the rewards say of them."""

    title: str
    sampler: Sampler
    found: Result
    media_BFCHW: np.ndarray
    """uint8."""
    scores: Scores
    cost: Cost
    """Of the method alone, not of the scores here."""

    def summary(self, sample: Sample, plain: Outcome | None) -> dict[str, Any]:
        """Means, diversity, and wins against plain sampling where that was done."""
        held_out = {r.title for r in sample.held_out}
        line: dict[str, Any] = {"reward/total/mean": _mean(self.scores.total_B)}
        for title, value_B in self.scores.raw.items():
            line[f"{'held_out' if title in held_out else 'reward'}/{title}/mean"] = _mean(value_B)
        line["diversity/pixel_rms"] = pixel_diversity(self.media_BFCHW)
        if plain is not None and plain is not self:
            line["win_rate"] = win_rate(self.scores.total_B, plain.scores.total_B)
        return line


def _mean(value_B: np.ndarray) -> float:
    return float(np.nanmean(value_B)) if np.isfinite(value_B).any() else math.nan
