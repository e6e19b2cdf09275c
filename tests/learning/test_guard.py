"""The guard and its limits, evaluation by evaluation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlalign.core.registry import build
from rlalign.learning.guard import Guard, GuardSettings


def limit(name: str, **settings: Any) -> Any:
    return build("limits", {"name": name, **settings})


FALLS = limit("held_out", reward="shapes", drop=0.1)


def guard_of(*limits: Any, **settings: Any) -> Guard:
    return Guard(GuardSettings(limits=limits, **settings))


def summary(trained: float, held_out: float) -> dict[str, float]:
    return {"reward/total/mean": trained, "held_out/shapes/mean": held_out}


def test_it_counts_falls_under_a_rising_reward_and_stops() -> None:
    guard = guard_of(FALLS, patience=2)
    assert guard.observe(0, summary(0.0, 0.5)) == ""
    assert guard.observe(1, summary(0.2, 0.45)) == "", "within the drop"
    assert guard.observe(2, summary(0.3, 0.39)) == "", "counts once"
    said = guard.observe(3, summary(0.4, 0.3))
    assert "after round 3 the held-out reward shapes is 0.300, its best was 0.500" in said
    assert "rose from 0.000 to 0.400; the run stops" in said
    assert guard.stopped
    assert guard.observe(4, summary(0.5, 0.2)) == "", "it speaks once"


def test_a_recovery_sets_the_count_back() -> None:
    guard = guard_of(FALLS, patience=2)
    for round, held_out in enumerate((0.5, 0.3, 0.45, 0.3, 0.45)):
        assert guard.observe(round, summary(0.1 * round, held_out)) == ""
    assert not guard.stopped


def test_a_fall_of_both_is_no_over_optimisation() -> None:
    guard = guard_of(FALLS, patience=1)
    guard.observe(0, summary(0.5, 0.5))
    assert guard.observe(1, summary(0.4, 0.1)) == ""


def test_halving_goes_on_and_halves_again() -> None:
    guard = guard_of(FALLS, patience=1, action="halve")
    guard.observe(0, summary(0.0, 0.5))
    assert "learning rate is now 0.5 of" in guard.observe(1, summary(0.1, 0.2))
    assert "learning rate is now 0.25 of" in guard.observe(2, summary(0.2, 0.1))
    assert not guard.stopped


@pytest.mark.parametrize("wrong", [summary(0.0, float("nan")), summary(float("nan"), 0.5)])
def test_an_evaluation_without_a_number_is_left_out_and_said(wrong: dict[str, float]) -> None:
    """Also the first one: what follows is judged as if it had not been; between two falls it takes
    none back."""
    guard = guard_of(FALLS, patience=2)
    assert "after round 0" in guard.observe(0, wrong) and "is left out" in guard.observe(0, wrong)
    assert guard.observe(1, summary(0.0, 0.5)) == ""
    assert guard.observe(2, summary(0.2, 0.3)) == "", "counts once"
    guard.observe(3, wrong)
    assert "the run stops" in guard.observe(4, summary(0.3, 0.3))


def test_no_title_is_no_guard() -> None:
    assert guard_of().observe(1, {"reward/total/mean": 1.0}) == ""


def test_its_state_survives_json() -> None:
    whole, parts = guard_of(FALLS), guard_of(FALLS)
    for round, held_out in enumerate((0.5, 0.3)):
        whole.observe(round, summary(0.1 * round, held_out))
    parts.load(json.loads(json.dumps(whole.facts())))
    assert parts.observe(2, summary(0.2, 0.2)) == whole.observe(2, summary(0.2, 0.2)) != ""


def measured(kl: float = 0.0, diversity: float = 0.2) -> dict[str, float]:
    return {"kl/per_step_gaussian": kl, "diversity/pixel_rms": diversity}


def test_a_kl_above_its_limit_counts() -> None:
    guard = guard_of(limit("kl", most=0.1))
    said = [guard.observe(r, measured(kl=kl)) for r, kl in enumerate((0.0, 0.2, 0.1, 0.2, 0.3))]
    assert said == [
        "",
        "",
        "",
        "",
        "guard: after round 4 the KL to the pretrained model is 0.3, above 0.1; the run stops",
    ]


def test_diversity_is_held_to_the_first_evaluations() -> None:
    guard = guard_of(limit("diversity", least=0.5), patience=1, action="halve")
    assert guard.observe(0, measured(diversity=0.2)) == ""
    assert guard.observe(1, measured(diversity=0.1)) == "", "half is enough"
    assert guard.observe(2, measured(diversity=0.09)) == (
        "guard: after round 2 the diversity of the pictures is 0.09, below 0.5 of the first"
        " evaluation's 0.2; the learning rate is now 0.5 of its setting"
    )
    again = guard_of(limit("diversity", least=0.5), patience=1)
    again.load(json.loads(json.dumps(guard.facts())))
    assert "first evaluation's 0.2; the run stops" in again.observe(3, measured(diversity=0.09))


def test_every_crossed_limit_is_named_and_counts_once() -> None:
    guard = guard_of(FALLS, limit("kl", most=0.1), limit("diversity", least=0.9), action="raise_kl")
    guard.observe(0, summary(0.0, 0.5) | measured())
    assert guard.observe(1, summary(0.1, 0.5) | measured(kl=0.2)) == ""
    said = guard.observe(2, summary(0.2, 0.3) | measured(kl=0.2, diversity=0.1))
    assert [said.count(word) for word in ("held-out", "KL to the", "diversity")] == [1, 1, 1]
    assert said.endswith("the KL weight is now 2 times its setting")
    assert (guard.kl, guard.rate, guard.stopped) == (2.0, 1.0, False)


def test_two_held_out_rewards_are_watched_apart() -> None:
    guard = guard_of(FALLS, limit("held_out", reward="bytes", drop=0.1), patience=1)
    other = {"held_out/bytes/mean": 0.9}
    assert guard.observe(0, summary(0.0, 0.5) | other) == ""
    said = guard.observe(1, summary(0.1, 0.5) | {"held_out/bytes/mean": 0.2})
    assert "the held-out reward bytes is 0.200, its best was 0.900" in said
    assert "shapes" not in said


def test_a_checkpoint_of_before_there_was_a_list_of_limits_is_read() -> None:
    """The first had a held-out reward alone."""
    guard = guard_of(FALLS, limit("diversity", least=0.5))
    guard.load({"best": [0.5, 0.1], "count": 1, "rate": 0.5, "reason": ""})
    assert (guard.kl, guard.rate) == (1.0, 0.5)
    now = summary(0.2, 0.3) | measured(diversity=0.1)
    assert "its best was 0.500" in guard.observe(3, now)

    later = {"diversity": 0.4, "kl": 2.0}
    guard.load({"best": [0.5, 0.1], "count": 1, "rate": 0.5, "reason": "", **later})
    assert "first evaluation's 0.4" in guard.observe(3, now)
