"""The guard's rule, evaluation by evaluation."""

from __future__ import annotations

import json

import pytest

from rlalign.learning.guard import Guard, GuardSettings


def summary(trained: float, held_out: float) -> dict[str, float]:
    return {"reward/total/mean": trained, "held_out/shapes/mean": held_out}


def test_it_counts_falls_under_a_rising_reward_and_stops() -> None:
    guard = Guard(GuardSettings(held_out="shapes", drop=0.1, patience=2))
    assert guard.observe(0, summary(0.0, 0.5)) == ""
    assert guard.observe(1, summary(0.2, 0.45)) == "", "within the drop"
    assert guard.observe(2, summary(0.3, 0.39)) == "", "counts once"
    said = guard.observe(3, summary(0.4, 0.3))
    assert "after round 3 the held-out reward shapes is 0.300, its best was 0.500" in said
    assert "rose from 0.000 to 0.400; the run stops" in said
    assert guard.stopped
    assert guard.observe(4, summary(0.5, 0.2)) == "", "it speaks once"


def test_a_recovery_sets_the_count_back() -> None:
    guard = Guard(GuardSettings(held_out="shapes", drop=0.1, patience=2))
    for round, held_out in enumerate((0.5, 0.3, 0.45, 0.3, 0.45)):
        assert guard.observe(round, summary(0.1 * round, held_out)) == ""
    assert not guard.stopped


def test_a_fall_of_both_is_no_over_optimisation() -> None:
    guard = Guard(GuardSettings(held_out="shapes", drop=0.1, patience=1))
    guard.observe(0, summary(0.5, 0.5))
    assert guard.observe(1, summary(0.4, 0.1)) == ""


def test_halving_goes_on_and_halves_again() -> None:
    guard = Guard(GuardSettings(held_out="shapes", drop=0.1, patience=1, action="halve"))
    guard.observe(0, summary(0.0, 0.5))
    assert "learning rate is now 0.5 of" in guard.observe(1, summary(0.1, 0.2))
    assert "learning rate is now 0.25 of" in guard.observe(2, summary(0.2, 0.1))
    assert not guard.stopped


@pytest.mark.parametrize("wrong", [summary(0.0, float("nan")), summary(float("nan"), 0.5)])
def test_an_evaluation_without_a_number_is_left_out_and_said(wrong: dict[str, float]) -> None:
    """Also the first one: what follows is judged as if it had not been; between two falls it takes
    none back."""
    guard = Guard(GuardSettings(held_out="shapes", drop=0.1, patience=2))
    assert "after round 0" in guard.observe(0, wrong) and "is left out" in guard.observe(0, wrong)
    assert guard.observe(1, summary(0.0, 0.5)) == ""
    assert guard.observe(2, summary(0.2, 0.3)) == "", "counts once"
    guard.observe(3, wrong)
    assert "the run stops" in guard.observe(4, summary(0.3, 0.3))


def test_no_title_is_no_guard() -> None:
    assert Guard(GuardSettings()).observe(1, {"reward/total/mean": 1.0}) == ""


def test_its_state_survives_json() -> None:
    settings = GuardSettings(held_out="shapes", drop=0.1, patience=2)
    whole, parts = Guard(settings), Guard(settings)
    for round, held_out in enumerate((0.5, 0.3)):
        whole.observe(round, summary(0.1 * round, held_out))
    parts.load(json.loads(json.dumps(whole.facts())))
    assert parts.observe(2, summary(0.2, 0.2)) == whole.observe(2, summary(0.2, 0.2)) != ""
