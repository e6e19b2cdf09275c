"""What a sample below a constraint counts for, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.alignment._constraints import apply_constraints
from tests.learning.test_reward_facts import NAN, reward, scored_by


def totals(scored) -> list[float]:
    return np.concatenate([s.total_B for s in scored]).tolist()


def test_nothing_to_do_hands_back_what_it_got():
    scored = scored_by([1, 1], a=[1, 2])
    assert apply_constraints([reward("a")], "sum", scored) is scored
    assert apply_constraints([reward("a")], "product", scored) is scored


def test_a_sample_below_gets_the_lowest_total_of_its_prompt():
    """Sample 0 has prompt 1's best total and is unsafe: it counts as its worst. The unsafe sample
    of prompt 2 is the worst already, and prompt 3's are both unsafe: neither is better."""
    rewards = [reward("a"), reward("safe", at_least=0.5)]
    scored = scored_by(
        [1, 1, 1, 2, 2, 3, 3],
        a=[9.0, 1.0, 4.0, 0.0, 8.0, 2.0, 6.0],
        safe=[0.25, 0.5, 1.0, 0.0, 1.0, 0.25, 0.0],
    )
    ruled = apply_constraints(rewards, "sum", scored)
    assert totals(ruled) == [1.5, 1.5, 5.0, 0.0, 9.0, 2.25, 2.25]
    assert totals(scored)[0] == 9.25, "what the metrics show stays"
    assert all(new.raw is old.raw for new, old in zip(ruled, scored, strict=True))
    assert all(s.by_reward == {} for s in ruled)


def test_dropped_samples_stay_dropped_and_have_no_say():
    rewards = [reward("a"), reward("safe", at_least=0.5, weight=0.0)]
    scored = scored_by([1, 1, 1], a=[NAN, 3.0, 2.0], safe=[0.0, 0.0, 1.0])
    ruled = apply_constraints(rewards, "sum", scored)
    np.testing.assert_array_equal(totals(ruled), [NAN, 3.0, 3.0])


def test_two_constraints_are_kept_at_once():
    rewards = [reward("a", at_least=2.0), reward("b", at_least=1.0)]
    ruled = apply_constraints(rewards, "sum", scored_by([1, 1, 1], a=[1, 5, 3], b=[9, 0, 1]))
    assert totals(ruled) == [4.0, 4.0, 4.0]


def test_normalised_rewards_come_each_by_itself_and_lowered_each():
    rewards = [reward("a", weight=2.0), reward("safe", at_least=0.5)]
    scored = scored_by([1, 1, 1], a=[9.0, 1.0, 4.0], safe=[0.25, 0.75, 1.0])
    ruled = apply_constraints(rewards, "normalised", scored)
    parts = {
        title: (weight, np.concatenate([s.by_reward[title][1] for s in ruled]).tolist())
        for title, (weight, _) in ruled[0].by_reward.items()
    }
    assert parts == {"a": (2.0, [1.0, 1.0, 4.0]), "safe": (1.0, [0.25, 0.75, 1.0])}


@pytest.mark.parametrize("combine", ["sum", "normalised"])
def test_no_samples_are_none(combine):
    assert apply_constraints([reward("a", at_least=1.0)], combine, []) == []
