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


def measured(kl: float = 0.0, diversity: float = 0.2) -> dict[str, float]:
    return {"kl/per_step_gaussian": kl, "diversity/pixel_rms": diversity}


def test_a_kl_above_its_limit_counts() -> None:
    guard = Guard(GuardSettings(kl_most=0.1, patience=2))
    said = [guard.observe(r, measured(kl=kl)) for r, kl in enumerate((0.0, 0.2, 0.1, 0.2, 0.3))]
    assert said == [
        "",
        "",
        "",
        "",
        "guard: after round 4 the KL to the pretrained model is 0.3, above 0.1; the run stops",
    ]


def test_diversity_is_held_to_the_first_evaluations() -> None:
    guard = Guard(GuardSettings(diversity_least=0.5, patience=1, action="halve"))
    assert guard.observe(0, measured(diversity=0.2)) == ""
    assert guard.observe(1, measured(diversity=0.1)) == "", "half is enough"
    assert guard.observe(2, measured(diversity=0.09)) == (
        "guard: after round 2 the diversity of the pictures is 0.09, below 0.5 of the first"
        " evaluation's 0.2; the learning rate is now 0.5 of its setting"
    )
    again = Guard(GuardSettings(diversity_least=0.5, patience=1))
    again.load(json.loads(json.dumps(guard.facts())))
    assert "first evaluation's 0.2; the run stops" in again.observe(3, measured(diversity=0.09))


def test_every_broken_rule_is_named_and_counts_once() -> None:
    settings = GuardSettings(
        held_out="shapes", drop=0.1, kl_most=0.1, diversity_least=0.9, patience=2, action="raise_kl"
    )
    guard = Guard(settings)
    guard.observe(0, summary(0.0, 0.5) | measured())
    assert guard.observe(1, summary(0.1, 0.5) | measured(kl=0.2)) == ""
    said = guard.observe(2, summary(0.2, 0.3) | measured(kl=0.2, diversity=0.1))
    assert [said.count(word) for word in ("held-out", "KL to the", "diversity")] == [1, 1, 1]
    assert said.endswith("the KL weight is now 2 times its setting")
    assert (guard.kl, guard.rate, guard.stopped) == (2.0, 1.0, False)


def test_a_checkpoint_of_before_there_were_more_rules_is_read() -> None:
    guard = Guard(GuardSettings(held_out="shapes"))
    guard.load({"best": [0.5, 0.1], "count": 1, "rate": 0.5, "reason": ""})
    assert (guard.kl, guard.rate) == (1.0, 0.5)
