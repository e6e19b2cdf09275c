"""How much of a run's time each reward takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SECONDS = "seconds/reward/"


def reward_shares(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Reward title -> its share of the time of rounds, the largest first; of metrics lines.

    A round's time counts where the learner waited for it: a reward that is computed while the
    learner learns takes none.
    """
    whole = sum(line.get("seconds/round") or 0.0 for line in rounds)
    spent: dict[str, float] = {}
    for line in rounds:
        for key, seconds in line.items():
            if key.startswith(_SECONDS):
                title = key.removeprefix(_SECONDS)
                spent[title] = spent.get(title, 0.0) + (seconds or 0.0)
    shares = {title: seconds / max(whole, 1e-9) for title, seconds in spent.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
