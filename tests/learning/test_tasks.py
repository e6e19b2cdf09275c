"""Scores by task: GenEval's summary."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlalign.core.prompts import Prompt
from rlalign.learning.tasks import task_scores


def tagged(*tags):
    return [Prompt("a photo", {"tag": tag}) for tag in tags]


def test_the_overall_score_is_the_mean_of_the_tasks():
    prompts = tagged("counting", "colors", "counting", "counting")
    assert task_scores(prompts, np.array([1.0, 1.0, 0.0, 0.0])) == {
        "task/counting": pytest.approx(1 / 3),
        "task/colors": 1.0,
        "tasks": pytest.approx(2 / 3),
    }


def test_a_missing_score_is_left_out():
    found = task_scores(tagged("counting", "counting", "colors"), np.array([1.0, np.nan, np.nan]))
    assert found["task/counting"] == 1.0
    assert math.isnan(found["task/colors"]) and math.isnan(found["tasks"])


def test_prompts_without_tasks_have_none():
    assert task_scores([], np.array([])) == {}
    assert task_scores([*tagged("counting"), "a plain prompt"], np.zeros(2)) == {}
    assert task_scores(tagged(3), np.zeros(1)) == {}
