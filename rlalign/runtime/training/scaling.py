"""Automatic scaling of the rollout pool: more workers while the learner waits for rollouts, fewer
while samples wait for it.

A worker more pays only where the rollouts' share of a round is large: with n workers a round waits
about w seconds, with n + 1 about w n / (n + 1). So the pool grows by a quarter (one at least) while
waiting takes more than GROW of a round, and shrinks by one when it takes less than SHRINK, which
happens only where rounds are made ahead (``max_staleness`` above 0).

The learner also waits where a reward is slow, and then more rollouts would only queue up at it.
Units pass through the pools one after another, so they queue at the one whose workers have the most
to do in a round: the pool grows only where a rollout worker worked longer than a worker of any
reward. It looks at the median of LOOK rounds made with the present number of workers, so that it
does not swing.

Of workers that are wanted and not there, as where spot machines have gone and none has come, some
may not be needed: where the learner hardly waits although they are missing, they are wanted no
more. The pool stays between ``workers`` and ``max_workers``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlalign.runtime.roles import ROLLOUT, Role

GROW = 0.4
SHRINK = 0.05
LOOK = 3
WORKED = "seconds/worked/"
"""Before a role's name in a metrics line: seconds that each of its workers worked in the round."""


class _Round(NamedTuple):
    share: float
    """Of the round: the learner waited."""
    rollout: float
    """Seconds that a rollout worker worked."""
    rewards: Mapping[str, float]
    """Reward title -> seconds that one of its workers worked."""


class Balance:
    """Decides from the metrics lines of rounds. ``most`` 0 switches it off."""

    def __init__(self, least: int, most: int, rewards: Sequence[Role]) -> None:
        self._least = least
        self._most = most
        self._rewards = rewards
        self._rounds: list[_Round] = []
        self._ready = self._judged = 0
        self.reason = ""
        """Of the last change."""
        self.advice = ""
        """What would help where more rollout workers would not."""

    def pools(self, *, ready: int) -> None:
        """How many rollout workers answer now; rounds made with different numbers are not judged
        together."""
        self._ready = ready

    def wanted(self, line: Mapping[str, Any], workers: int) -> int | None:
        """The number of rollout workers to have from now on; None: as it is."""
        # nothing is decided without a limit, or while a change is under way
        if not self._most or not line.get("seconds/round"):
            return None
        if self._ready > workers or self._ready != self._judged:
            self._rounds.clear()
            self._judged = self._ready
        if self._ready > workers:
            return None

        # one round alone says little
        self._rounds.append(self._round(line))
        if len(self._rounds) < LOOK:
            return None
        last = self._rounds[-LOOK:]
        share = statistics.median(r.share for r in last)
        slow = self._slow_reward(last)

        # more rollout workers do not help where a reward is slow
        self.advice = ""
        if share > GROW and slow:
            self.advice = (
                f"reward-bound, the learner waits {100 * share:.0f} % of a round for {slow}:"
                f" rollout workers stay {workers}; rlalign scale RUN --reward {slow}=N helps"
            )
            return None

        # it grows by a quarter, once all are there, and shrinks by one, or by those that are not
        if share > GROW and self._ready == workers < self._most:
            wanted = min(workers + max(1, workers // 4), self._most)
            bound = "rollout-bound"
        elif share < SHRINK and workers > self._least:
            wanted = max(self._least, min(self._ready, workers - 1))
            bound = "learner-bound"
        else:
            return None

        # the next decision needs rounds under the new number
        self._rounds.clear()
        self.reason = f"{bound}, the learner waits {100 * share:.0f} % of a round"
        return wanted

    def _slow_reward(self, rounds: list[_Round]) -> str:
        """The reward at which units queue; "" where they queue at the rollouts."""
        worked = {
            title: statistics.median(r.rewards.get(title, 0.0) for r in rounds)
            for title in rounds[-1].rewards
        }
        slowest = max(worked, key=lambda title: worked[title], default="")
        return (
            slowest
            if slowest and worked[slowest] > statistics.median(r.rollout for r in rounds)
            else ""
        )

    def _round(self, line: Mapping[str, Any]) -> _Round:
        share = (line["seconds/rollout"] + line["seconds/reward"]) / line["seconds/round"]
        rewards = {role.reward: line.get(f"{WORKED}{role.metric}", 0.0) for role in self._rewards}
        return _Round(share, line[f"{WORKED}{ROLLOUT.metric}"], rewards)
