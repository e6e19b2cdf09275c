"""What the metrics say of several rewards, against numpy's own figures and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlalign.core.records import Scored, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.learning.reward_facts import reward_facts
from tests.toy import PLAN

NAN = float("nan")


def reward(label: str, **settings):
    return build("rewards", {"name": "jpeg", "label": label, **settings})


def scored_by(prompts: list[int], weight: float = 1.0, **scores: list[float]) -> list[Scored]:
    """One unit a sample, so that the samples of a prompt lie in several."""
    found = []
    for i, prompt in enumerate(prompts):
        unit = Unit.of_rows(UnitKey("train", 1, i), [(prompt, f"prompt {prompt}", i)], 0, PLAN)
        raw = {title: np.array([own[i]], dtype=np.float32) for title, own in scores.items()}
        total_B = np.asarray(sum(raw.values()), dtype=np.float32)
        found.append(Scored(unit=unit, policy_version=0, raw=raw, total_B=total_B))
    return found


def test_flat_groups_are_those_that_cannot_be_told_apart():
    """Prompt 1 is flat in a, prompt 2 in both, prompt 3 in neither; the lone sample of prompt 4
    counts nowhere."""
    scored = scored_by([1, 1, 2, 2, 3, 3, 4], a=[5, 5, 1, 1, 0, 1, 7], b=[0, 2, 4, 4, 1, 0, 7])
    line = reward_facts(scored, [reward("a"), reward("b")])
    assert line["reward/a/flat_groups"] == pytest.approx(2 / 3)
    assert line["reward/b/flat_groups"] == pytest.approx(1 / 3)
    assert line["reward/total/flat_groups"] == pytest.approx(2 / 3), "a + b is 1 and 1 for prompt 3"


def test_correlation_is_of_differences_within_prompts():
    """Between prompts both rise together; within each they go against each other."""
    a = [0.0, 1.0, 2.0, 10.0, 11.0, 13.0]
    b = [3.0, 2.0, 1.5, 33.0, 30.0, 31.0]
    line = reward_facts(scored_by([1, 1, 1, 2, 2, 2], a=a, b=b), [reward("a"), reward("b")])
    centred = [
        np.concatenate([np.array(own[:3]) - np.mean(own[:3]), np.array(own[3:]) - np.mean(own[3:])])
        for own in (a, b)
    ]
    assert line["reward/a/correlation/b"] == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-6)
    assert line["reward/a/correlation/b"] < 0 < np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize(("b", "expected"), [([1, 2, 3, 5], 1.0), ([-1, -2, -3, -5], -1.0)])
def test_rewards_that_are_one_correlate_fully(b, expected):
    line = reward_facts(scored_by([1, 1, 1, 1], a=[1, 2, 3, 5], b=b), [reward("a"), reward("b")])
    assert line["reward/a/correlation/b"] == pytest.approx(expected)


def test_a_reward_without_spread_correlates_with_nothing():
    line = reward_facts(scored_by([1, 1], a=[1, 2], b=[3, 3]), [reward("a"), reward("b")])
    assert math.isnan(line["reward/a/correlation/b"])


def test_a_dropped_sample_has_no_say():
    rewards = [reward("a"), reward("b", at_least=2.5)]
    whole = reward_facts(scored_by([1, 1, 2, 2], a=[1, 2, 4, 3], b=[3, 2, 1, 5]), rewards)
    holed = scored_by([1, 1, 1, 2, 2], a=[1, 2, 9, 4, 3], b=[3, 2, NAN, 1, 5])
    assert reward_facts(holed, rewards) == pytest.approx(whole)
    assert whole["constraint/b/below"] == 2


def test_lone_samples_and_no_samples_say_nothing():
    assert reward_facts(scored_by([1, 2], a=[1, 2]), [reward("a")]) == {}
    assert reward_facts([], [reward("a")]) == {}
    assert reward_facts(scored_by([1, 1], a=[NAN, NAN]), [reward("a")]) == {}
