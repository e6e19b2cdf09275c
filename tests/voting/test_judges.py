"""Simulated people choose as often as their formula says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlalign.voting.judges import Judge, agreement
from rlalign.voting.settings import Simulate
from tests.votes import png


def judge(**changes: float) -> Judge:
    settings = {
        "votes": 1,
        "utility": [{"name": "function", "call": "tests.voting.test_queue:brightness"}],
        "temperature": 0.1,
        "lapse": 0.0,
        "left": 0.0,
        **changes,
    }
    return Judge(Simulate.model_validate(settings), 0)


def test_a_left_picture_is_chosen_as_often_as_the_formula_says() -> None:
    """2,000 draws: the standard error is at most 0.0112; the margin is four of them."""
    one = judge(lapse=0.1, left=0.3)
    pictures = [png(100), png(80)]
    difference = 20 / 255
    wins = 1 / (1 + math.exp(-(difference / 0.1 + 0.3)))
    expected = 0.05 + 0.9 * wins
    assert one.chance_of_left(difference) == pytest.approx(expected)
    left = [one.answer("c", pictures, "somebody", k).choice == "left" for k in range(2000)]
    assert np.mean(left) == pytest.approx(expected, abs=0.045)


def test_a_choice_depends_on_its_key_alone() -> None:
    pictures = [png(100), png(99)]
    said = [judge().answer("c", pictures, "p", k).choice for k in range(40)]
    assert said == [judge().answer("c", pictures, "p", k).choice for k in range(40)]
    assert said != [judge().answer("c", pictures, "q", k).choice for k in range(40)]


def test_agreement_of_two_people() -> None:
    assert agreement(judge(), [0.0]) == pytest.approx(0.5)
    assert agreement(judge(), [100.0]) == pytest.approx(1.0)
    # right 8 times of 10: 0.64 + 0.04
    difference = 0.1 * math.log(4.0)
    assert agreement(judge(), [difference]) == pytest.approx(0.68)
    # a coin for both sides' bias: the two sides of a pair differ
    biased = judge(left=math.log(4.0))
    assert agreement(biased, [0.0]) == pytest.approx(0.68)


def test_a_ranking_puts_the_best_first_as_often_as_luce_says() -> None:
    one = judge()
    pictures = [png(100), png(120), png(110)]
    weight = np.exp(np.array([100, 120, 110]) / 255 / 0.1)
    first = [one.answer("c", pictures, "p", k).ranking[0][0] for k in range(2000)]
    share = np.bincount(first, minlength=3) / 2000
    assert share == pytest.approx(weight / weight.sum(), abs=0.045)
