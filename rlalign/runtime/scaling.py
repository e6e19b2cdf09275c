"""Automatic scaling of the rollout pool: more workers while the learner waits for samples, fewer while samples wait for it.

A worker more pays only where the rollouts' share of a round is large: with n workers a round waits about w seconds, with
n + 1 about w n / (n + 1). So the pool grows by a quarter (one at least) while waiting takes more than GROW of a round, and
shrinks by one when it takes less than SHRINK, which happens only where rounds are made ahead (``max_staleness`` above 0).
It looks at the median of LOOK rounds made with the present number of workers, so that it does not swing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

GROW, SHRINK, LOOK = 0.4, 0.05, 3


class Balance:
    """Decides from the metrics lines of rounds. ``most`` 0 switches it off."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._shares: list[float] = []
        self._ready = 0
        self.reason = ""

    def pools(self, *, ready: int) -> None:
        """How many rollout workers answer now; rounds made with fewer than wanted are not judged."""
        self._ready = ready

    def wanted(self, line: Mapping[str, Any], workers: int) -> int | None:
        """The number of rollout workers to have from now on; None: as it is."""
        if not self._most or not line.get("seconds/round"):
            return None
        if self._ready != workers:  # a change is under way
            self._shares.clear()
            return None
        self._shares.append((line["seconds/rollout"] + line["seconds/reward"]) / line["seconds/round"])
        if len(self._shares) < LOOK:
            return None
        share = statistics.median(self._shares[-LOOK:])
        if share > GROW and workers < self._most:
            wanted, bound = min(workers + max(1, workers // 4), self._most), "rollout-bound"
        elif share < SHRINK and workers > self._least:
            wanted, bound = workers - 1, "learner-bound"
        else:
            return None
        self._shares.clear()
        self.reason = f"{bound}, the learner waits {100 * share:.0f} % of a round"
        return wanted
