"""How the rewards of a round stand to each other: what the metrics line says beside their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from rlalign.core.records import Scored, prompt_ids_of
from rlalign.rewards.base import Reward


def reward_facts(scored: Sequence[Scored], rewards: Sequence[Reward]) -> dict[str, float]:
    """A round's part of the metrics line about its rewards together.

    ``reward/NAME/flat_groups``: share of prompts with two or more kept samples whose scores are all
    equal, which teach nothing. ``reward/NAME/correlation/OTHER``: Pearson's, of the scores'
    differences from their prompt's mean; NaN where one has no spread. ``constraint/NAME/below``:
    samples below the reward's ``at_least``.
    """
    if not scored:
        return {}
    prompt_B = np.array(prompt_ids_of(s.unit for s in scored))
    kept_B = np.concatenate([s.kept_B for s in scored])
    _, group_B = np.unique(prompt_B[kept_B], return_inverse=True)
    score_B = {r.title: np.concatenate([s.raw[r.title] for s in scored]) for r in rewards}
    kept = {"total": np.concatenate([s.total_B for s in scored]), **score_B}
    kept = {title: values[kept_B].astype(np.float64) for title, values in kept.items()}

    # prompts whose samples cannot be told apart
    line: dict[str, float] = {}
    has_company = len(group_B) > 0 and np.bincount(group_B).max() > 1
    if has_company:
        for title, values in kept.items():
            line[f"reward/{title}/flat_groups"] = _share_of_flat(values, group_B)

    # rewards that pull together, or against each other
    if has_company:
        line |= _correlations({r.title: kept[r.title] for r in rewards}, group_B)
    for reward in rewards:
        if reward.at_least is not None:
            below = int((score_B[reward.title] < reward.at_least).sum())
            line[f"constraint/{reward.title}/below"] = below
    return line


def _share_of_flat(values_B: np.ndarray, group_B: np.ndarray) -> float:
    """Share of groups of two or more whose values are all equal."""
    groups = [values_B[group_B == group] for group in range(group_B.max() + 1)]
    flat = [bool(np.ptp(own) == 0) for own in groups if len(own) > 1]
    return float(np.mean(flat))


def _correlations(scores: Mapping[str, np.ndarray], group_B: np.ndarray) -> dict[str, float]:
    """Key -> correlation of two rewards within groups."""
    size = np.bincount(group_B)
    centred = {
        title: values - (np.bincount(group_B, weights=values) / size)[group_B]
        for title, values in scores.items()
    }
    found = {}
    for (one, a), (other, b) in combinations(centred.items(), 2):
        scale = float(np.sqrt((a @ a) * (b @ b)))
        found[f"reward/{one}/correlation/{other}"] = (
            float(a @ b) / scale if scale > 0 else float("nan")
        )
    return found
