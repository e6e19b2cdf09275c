"""What a round is learned from, where its rewards have constraints or scales of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlalign.core.records import Scored, prompt_ids_of
from rlalign.rewards.base import Combine, Reward


def apply_constraints(
    rewards: Sequence[Reward], combine: Combine, scored: Sequence[Scored]
) -> Sequence[Scored]:
    """A round's samples as they are learned from.

    A sample with a score below its reward's ``at_least`` gets the lowest total of its prompt's
    samples, and under ``normalised`` the lowest of each reward; dropped samples stay dropped. Raw
    scores, which the metrics show, stay what they are.
    """
    has_constraint = any(r.at_least is not None for r in rewards)
    if not scored or not (has_constraint or combine == "normalised"):
        return scored

    # a group is the samples of a prompt in the round, whichever units they are in
    prompt_B = np.array(prompt_ids_of(s.unit for s in scored))
    below_B = below_limit(rewards, scored)
    total_B = _lowered(np.concatenate([s.total_B for s in scored]), prompt_B, below_B)

    # each reward by itself
    score_B = {}
    if combine == "normalised":
        for reward in rewards:
            raw_B = np.concatenate([s.raw[reward.title] for s in scored])
            score_B[reward.title] = (reward.weight, _lowered(raw_B, prompt_B, below_B))

    # back to units
    ends = np.cumsum([len(s.total_B) for s in scored])
    starts = [0, *ends[:-1]]
    return [
        replace(
            one,
            total_B=total_B[start:end],
            by_reward={t: (weight, part_B[start:end]) for t, (weight, part_B) in score_B.items()},
        )
        for one, start, end in zip(scored, starts, ends, strict=True)
    ]


def below_limit(rewards: Sequence[Reward], scored: Sequence[Scored]) -> np.ndarray:
    """(B,) bool: samples of a round, in unit order, that break a constraint. A missing score breaks
    none."""
    broken_B = np.zeros(sum(len(s.total_B) for s in scored), dtype=bool)
    for reward in rewards:
        if reward.at_least is not None:
            broken_B |= np.concatenate([s.raw[reward.title] for s in scored]) < reward.at_least
    return broken_B


def _lowered(score_B: np.ndarray, prompt_B: np.ndarray, below_B: np.ndarray) -> np.ndarray:
    """(B,) scores in which those of ``below_B`` are the lowest of their prompt's."""
    out_B = score_B.copy()
    known_B = np.isfinite(score_B)
    for prompt in np.unique(prompt_B[below_B & known_B]):
        mine_B = (prompt_B == prompt) & known_B
        out_B[mine_B & below_B] = score_B[mine_B].min()
    return out_B
