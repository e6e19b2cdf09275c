"""Rewards to advantages: shift-invariant, scale-invariant up to eps, and independent of how samples
were split over workers.

Everything is computed in float64 on NumPy arrays of one whole round, NaN marking a dropped sample,
whose advantage is 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def over_round(reward_B: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """(B,) float64 (r - mean) / (std + eps) with the population std over the whole round."""
    kept = np.isfinite(reward_B)
    wide = reward_B.astype(np.float64)
    if not kept.any():
        return np.zeros_like(wide)
    return np.where(kept, (wide - wide[kept].mean()) / (wide[kept].std() + eps), 0.0)


def within_groups(
    reward_B: np.ndarray, group_B: Sequence[int], *, std: str = "group", eps: float = 1e-4
) -> np.ndarray:
    """(B,) float64 (r - group mean) / (std + eps); std of the group or of the round ("group" /
    "global"), or r - mean ("none").

    A group of one, or without spread, gives 0 (GRPO: Shao 2024, arXiv:2402.03300; Flow-GRPO uses
    the global std).
    """
    assert std in ("group", "global", "none"), std
    wide = reward_B.astype(np.float64)
    groups = np.asarray(group_B)
    kept = np.isfinite(wide)
    out = np.zeros_like(wide)
    if not kept.any():
        return out
    scale = wide[kept].std()
    for group in np.unique(groups):
        mine = (groups == group) & kept
        if mine.any():
            spread = 1.0 if std == "none" else (wide[mine].std() if std == "group" else scale) + eps
            out[mine] = (wide[mine] - wide[mine].mean()) / spread
    return out


class PromptStatistics:
    """Running rewards per prompt: the last ``size`` of each, used once ``min_count`` are there,
    else the whole round's.

    Black 2023 (arXiv:2305.13301, section 4.3 and appendix D). Statistics include the rewards just
    given.
    """

    def __init__(self) -> None:
        self._rewards: dict[int, deque[float]] = {}

    def advantages(
        self,
        reward_B: np.ndarray,
        prompt_B: Sequence[int],
        *,
        size: int,
        min_count: int,
        eps: float = 1e-6,
    ) -> np.ndarray:
        """Takes in a round's rewards and returns (B,) float64 (r - mean) / (std + eps)."""
        # samples without a reward have no advantage
        wide = reward_B.astype(np.float64)
        prompts = np.asarray(prompt_B)
        kept = np.isfinite(wide)
        out = np.zeros_like(wide)
        if not kept.any():
            return out
        mean_all = wide[kept].mean()
        std_all = wide[kept].std()

        # a prompt with too few rewards is compared with all samples
        for prompt in np.unique(prompts):
            mine = (prompts == prompt) & kept
            if not mine.any():
                continue
            seen = deque(self._rewards.get(int(prompt), ()), maxlen=size)
            seen.extend(wide[mine].tolist())
            self._rewards[int(prompt)] = seen
            enough = len(seen) >= min_count
            mean, std = (np.mean(seen), np.std(seen)) if enough else (mean_all, std_all)
            out[mine] = (wide[mine] - mean) / (std + eps)
        return out

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: prompt id -> its rewards, oldest first."""
        return {str(prompt): list(rewards) for prompt, rewards in sorted(self._rewards.items())}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """The inverse of ``state_dict``."""
        self._rewards = {int(prompt): deque(rewards) for prompt, rewards in state.items()}
