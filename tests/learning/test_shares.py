"""The share of a run's time that each reward takes."""

from __future__ import annotations

import pytest

from rlalign.learning.shares import reward_shares


def test_shares_are_of_the_whole_time_the_largest_first():
    lines = [
        {"seconds/round": 10.0, "seconds/reward": 6.0, "seconds/reward/jpeg": 1.0},
        {"seconds/round": 10.0, "seconds/reward/jpeg": 0.0, "seconds/reward/my judge": 5.0},
        {"seconds/round": None, "seconds/reward/jpeg": None},
    ]
    found = reward_shares(lines)
    assert found == {"my judge": pytest.approx(0.25), "jpeg": pytest.approx(0.05)}
    assert list(found) == ["my judge", "jpeg"]


def test_runs_of_before_have_none():
    assert reward_shares([]) == {}
    assert reward_shares([{"seconds/round": 2.0, "seconds/reward": 1.0}]) == {}
