"""Advantages: invariances to 1e-12 in float64 (eps is 0 where scale is concerned), NaN is a dropped
sample."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest

from rlalign.algorithms._advantages import PromptStatistics, over_round, within_groups
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import (
    AdvantageOver,
    relative_to_groups,
    rewards_of,
    standardised,
)
from rlalign.alignment.collect import LocalCollect
from rlalign.config import parse_run
from rlalign.core.records import Plan, Scored, Unit, UnitKey, Weights
from tests.toy import PROMPTS

RNG = np.random.default_rng(0)
REWARD_B = RNG.normal(3.0, 2.0, 24)
GROUP_B = np.repeat(np.arange(6), 4)


def per_prompt(reward_B: np.ndarray, *, eps: float = 1e-6) -> np.ndarray:
    return PromptStatistics().advantages(reward_B, GROUP_B.tolist(), size=16, min_count=2, eps=eps)


FORMS: dict[str, Callable[..., np.ndarray]] = {
    "round": over_round,
    "group": lambda r, **k: within_groups(r, GROUP_B.tolist(), **k),
    "group over the round's std": lambda r, **k: within_groups(
        r, GROUP_B.tolist(), std="global", **k
    ),
    "prompt": per_prompt,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@every_form
def test_a_shift_changes_nothing(form: Callable[..., np.ndarray]) -> None:
    assert np.allclose(form(REWARD_B + 17.0), form(REWARD_B), rtol=0, atol=1e-12)


@every_form
def test_a_positive_scale_changes_nothing(form: Callable[..., np.ndarray]) -> None:
    assert np.allclose(form(REWARD_B * 250.0, eps=0.0), form(REWARD_B, eps=0.0), rtol=0, atol=1e-12)
    assert np.allclose(form(REWARD_B * -1.0, eps=0.0), -form(REWARD_B, eps=0.0), rtol=0, atol=1e-12)


def test_centred_keeps_the_rewards_units() -> None:
    """r - group mean: shift-invariant, linear in scale, sums to 0 within a group, and a lone sample
    has none."""
    ids = GROUP_B.tolist()
    plain = within_groups(REWARD_B, ids, std="none")
    assert np.allclose(
        plain.reshape(6, 4), REWARD_B.reshape(6, 4) - REWARD_B.reshape(6, 4).mean(1, keepdims=True)
    )
    assert np.allclose(
        within_groups(REWARD_B * 250.0 + 17.0, ids, std="none"), 250.0 * plain, rtol=0, atol=1e-9
    )
    assert np.allclose(plain.reshape(6, 4).sum(1), 0.0, atol=1e-12)
    assert within_groups(np.array([3.0]), [0], std="none").tolist() == [0.0]


def test_eps_is_all_that_breaks_scale() -> None:
    """(r - m) / (s + eps): the default eps costs less than eps / s."""
    assert np.allclose(over_round(REWARD_B * 250.0), over_round(REWARD_B), rtol=1e-8)


@every_form
def test_nothing_depends_on_the_storage_type(form: Callable[..., np.ndarray]) -> None:
    """float32 rewards are widened first: a float32 array and its float64 copy give the same
    bits."""
    narrow = REWARD_B.astype(np.float32)
    assert np.array_equal(form(narrow), form(narrow.astype(np.float64)))
    assert form(narrow).dtype == np.float64


def test_permuting_samples_permutes_advantages() -> None:
    order = np.random.default_rng(1).permutation(len(REWARD_B))
    assert np.allclose(over_round(REWARD_B[order]), over_round(REWARD_B)[order], rtol=0, atol=1e-12)
    for std in ("group", "global"):
        straight = within_groups(REWARD_B, GROUP_B.tolist(), std=std)
        shuffled = within_groups(REWARD_B[order], GROUP_B[order].tolist(), std=std)
        assert np.allclose(shuffled, straight[order], rtol=0, atol=1e-12)
    straight = per_prompt(REWARD_B)
    shuffled = PromptStatistics().advantages(
        REWARD_B[order], GROUP_B[order].tolist(), size=16, min_count=2
    )
    assert np.allclose(shuffled, straight[order], rtol=0, atol=1e-12)


@every_form
def test_no_spread_gives_zero(form: Callable[..., np.ndarray]) -> None:
    assert np.array_equal(form(np.full(24, 2.5)), np.zeros(24))


def test_a_single_member_gives_zero() -> None:
    assert over_round(np.array([3.0])).tolist() == [0.0]
    reward_B, group_B = np.array([1.0, 2.0, 9.0]), [0, 0, 1]
    for std in ("group", "global"):
        assert within_groups(reward_B, group_B, std=std)[2] == 0.0
    assert PromptStatistics().advantages(reward_B, group_B, size=4, min_count=1)[2] == 0.0


def test_groups_sum_to_zero() -> None:
    assert abs(over_round(REWARD_B).sum()) < 1e-12
    for form in (partial(within_groups, std="group"), partial(within_groups, std="global")):
        sums = form(REWARD_B, GROUP_B.tolist()).reshape(6, 4).sum(1)
        assert np.abs(sums).max() < 1e-12


def test_group_and_global_std_weigh_prompts_differently() -> None:
    """Groups {0, 1} and {10, 30}: +-1 / +-1 under the group's std, +-.04 / +-.83 under the
    round's."""
    reward_B, group_B = np.array([0.0, 1.0, 10.0, 30.0]), [0, 0, 1, 1]
    assert within_groups(reward_B, group_B, eps=0.0).tolist() == pytest.approx([-1, 1, -1, 1])
    assert within_groups(reward_B, group_B, std="global", eps=0.0).tolist() == pytest.approx(
        [-0.04, 0.04, -0.83, 0.83], abs=5e-3
    )


def redness(media_BFCHW: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """Mean red in [0, 1], later for some pictures than for others, so that units end in another
    order than they began."""
    value_B = media_BFCHW[:, 0, 0].mean((-1, -2)) / 255.0
    time.sleep(float(value_B[0] * 1000 % 1) / 100)
    return value_B.tolist()


def advantages_of(workers: int, rounds: int = 3) -> list[np.ndarray]:
    """Per round and form, the advantages of a run's own samples, made and scored by so many
    workers."""
    run = parse_run(
        {
            "name": "sharded",
            "policy": {"name": "tests.toy:Toy"},
            "prompts": {
                "name": "list",
                "prompts": list(PROMPTS),
                "per_round": 8,
                "per_unit": 1,
                "samples_per_prompt": 3,
            },
            "rewards": [{"name": "function", "call": "tests.algorithms.test_advantages:redness"}],
            "algorithm": {"name": "ddpo"},
            "runtime": {"rollout": {"workers": workers}},
        }
    )
    collect, memory, found = LocalCollect(run), Memory(), []
    weights = Weights(version=0, kind="current", tensors=run.policy.load("cpu").weights())
    for round in range(1, rounds + 1):
        scored = collect.gather(collect.order(run.prompts.units(0, round, run.plan), weights))
        found += [
            standardised(scored, memory, over, min_count=8) for over in get_args(AdvantageOver)
        ]
        found.append(within_groups(*rewards_of(scored), std="global"))
    return found


def test_the_number_of_workers_changes_no_bit() -> None:
    """O18: three rounds of eight units, made by 1, 2, 3 and 4 workers that end in any order: every
    form gives the same bits."""
    alone = advantages_of(1)
    assert all(np.abs(a).max() > 1e-3 for a in alone), "there is something to compare"
    for workers in (2, 3, 4):
        for mine, theirs in zip(advantages_of(workers), alone, strict=True):
            assert np.array_equal(mine, theirs)


@every_form
def test_a_dropped_sample_has_no_advantage_and_no_say(form: Callable[..., np.ndarray]) -> None:
    """NaN gives 0 exactly, and the others' numbers are those of the round without it (1e-12)."""
    holed = REWARD_B.copy()
    holed[[1, 10]] = np.nan
    kept = np.isfinite(holed)
    with np.errstate(all="raise"):
        advantage_B = form(holed)
    assert np.array_equal(advantage_B[~kept], np.zeros(2))
    alone = {
        over_round: lambda: over_round(REWARD_B[kept]),
        FORMS["group"]: lambda: within_groups(REWARD_B[kept], GROUP_B[kept].tolist()),
        FORMS["group over the round's std"]: lambda: within_groups(
            REWARD_B[kept], GROUP_B[kept].tolist(), std="global"
        ),
        per_prompt: lambda: PromptStatistics().advantages(
            REWARD_B[kept], GROUP_B[kept].tolist(), size=16, min_count=2
        ),
    }[form]()
    assert np.allclose(advantage_B[kept], alone, rtol=0, atol=1e-12)


@every_form
def test_nothing_left_gives_zeros(form: Callable[..., np.ndarray]) -> None:
    assert np.array_equal(form(np.full(24, np.nan)), np.zeros(24))


def test_a_prompt_remembers_the_newest_rewards_only() -> None:
    statistics = PromptStatistics()
    statistics.advantages(np.arange(3.0), [7, 7, 7], size=4, min_count=1)
    statistics.advantages(np.array([10.0, 20.0, np.nan]), [7, 7, 7], size=4, min_count=1)
    assert statistics.state_dict() == {"7": [1.0, 2.0, 10.0, 20.0]}


def test_own_statistics_are_used_once_there_are_enough() -> None:
    """Two rounds of two rewards with min_count 4: the round's statistics first, then the prompt's
    own four."""
    statistics = PromptStatistics()
    first, second = np.array([1.0, 3.0, 10.0, 14.0]), np.array([2.0, 6.0, 20.0, 30.0])
    advantage = statistics.advantages(first, [0, 0, 1, 1], size=4, min_count=4, eps=0.0)
    assert advantage.tolist() == pytest.approx(((first - first.mean()) / first.std()).tolist())
    advantage = statistics.advantages(second, [0, 0, 1, 1], size=4, min_count=4, eps=0.0)
    seen = np.array([1.0, 3.0, 2.0, 6.0]), np.array([10.0, 14.0, 20.0, 30.0])
    expected = [
        (r - s.mean()) / s.std() for r, s in zip(second, np.repeat(seen, 2, axis=0), strict=True)
    ]
    assert advantage.tolist() == pytest.approx(expected)


def test_a_prompt_below_min_count_falls_back_while_others_do_not() -> None:
    reward_B = np.array([1.0, 3.0, 10.0])
    advantage = PromptStatistics().advantages(reward_B, [0, 0, 1], size=4, min_count=2, eps=0.0)
    assert advantage.tolist() == pytest.approx(
        [-1.0, 1.0, (10.0 - reward_B.mean()) / reward_B.std()]
    )


def test_statistics_survive_json_to_the_last_bit() -> None:
    """A run that was stopped goes on with the same numbers: state -> JSON text -> state."""
    straight, resumed = PromptStatistics(), PromptStatistics()
    first, second = RNG.normal(size=24).astype(np.float32), RNG.normal(size=24).astype(np.float32)
    straight.advantages(first, GROUP_B.tolist(), size=6, min_count=5)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.state_dict() == straight.state_dict()
    after = [
        s.advantages(second, GROUP_B.tolist(), size=6, min_count=5) for s in (straight, resumed)
    ]
    assert np.array_equal(*after)
    assert resumed.state_dict() == straight.state_dict()


def two_rewards(small_B: np.ndarray, large_B: np.ndarray, weights: tuple[float, float]) -> list:
    """A round of six prompts with four samples each, scored by two rewards with scales of their
    own."""
    scored = []
    for group in range(6):
        rows = [(group, f"prompt {group}", sample) for sample in range(4)]
        mine = slice(4 * group, 4 * group + 4)
        parts = {
            "small": (weights[0], small_B[mine].astype(np.float32)),
            "large": (weights[1], large_B[mine].astype(np.float32)),
        }
        scored.append(
            Scored(
                unit=Unit.of_rows(UnitKey("train", 1, group), rows, 0, Plan()),
                policy_version=0,
                raw={title: part_B for title, (_, part_B) in parts.items()},
                total_B=np.asarray(sum(w * part_B for w, part_B in parts.values()), np.float32),
                by_reward=parts,
            )
        )
    return scored


SMALL_B = RNG.normal(0.0, 0.01, 24)
LARGE_B = RNG.normal(50.0, 100.0, 24)
OVER_RULES: dict[str, Callable[..., np.ndarray]] = {
    "group": lambda scored: relative_to_groups(scored, "group"),
    "round's std": lambda scored: relative_to_groups(scored, "global"),
    "standardised within groups": lambda scored: standardised(scored, Memory(), "group"),
    "over the round": lambda scored: standardised(scored, Memory(), "global"),
    "running": lambda scored: standardised(scored, Memory(), "prompt", min_count=2),
}
every_rule = pytest.mark.parametrize("rule", OVER_RULES.values(), ids=OVER_RULES.keys())


@every_rule
def test_normalised_is_the_weighted_sum_of_each_rewards_advantages(rule) -> None:
    both = rule(two_rewards(SMALL_B, LARGE_B, (3.0, 0.5)))
    alone = [rule(two_rewards(SMALL_B, LARGE_B, weights)) for weights in ((1.0, 0.0), (0.0, 1.0))]
    np.testing.assert_allclose(both, 3.0 * alone[0] + 0.5 * alone[1], rtol=0, atol=1e-12)


def test_normalised_by_hand() -> None:
    """Two samples a prompt: +-1 of each reward whatever its scale, so that two rewards that
    disagree come to nothing and two that agree to 2 (eps is 1e-4 of a spread of 1 and more)."""
    scored = two_rewards(np.tile([1.0, 3.0], 12), np.tile([0.0, 4e6], 12), (1.0, 1.0))
    assert relative_to_groups(scored, "group") == pytest.approx(np.tile([-2.0, 2.0], 12), rel=1e-3)
    scored = two_rewards(np.tile([1.0, 3.0], 12), np.tile([4e6, 0.0], 12), (1.0, 1.0))
    assert relative_to_groups(scored, "group") == pytest.approx(np.zeros(24), abs=1e-3)


def test_a_scale_of_one_reward_changes_nothing_when_normalised_and_everything_in_a_sum() -> None:
    def follows_small(scored: list) -> float:
        return float(np.corrcoef(relative_to_groups(scored, "group"), SMALL_B)[0, 1])

    scored = two_rewards(SMALL_B * 100, LARGE_B, (1.0, 1.0))
    stretched = two_rewards(SMALL_B * 100, LARGE_B * 100, (1.0, 1.0))
    assert relative_to_groups(stretched, "group") == pytest.approx(
        relative_to_groups(scored, "group"), abs=1e-3
    )
    summed = [replace(one, by_reward={}) for one in stretched]
    assert follows_small(stretched) > 0.4
    assert abs(follows_small(summed) - np.corrcoef(LARGE_B, SMALL_B)[0, 1]) < 0.2


@every_rule
def test_a_sample_that_one_reward_dropped_has_no_advantage_of_any(rule) -> None:
    holed_B = SMALL_B.copy()
    holed_B[5] = np.nan
    advantage_B = rule(two_rewards(holed_B, LARGE_B, (1.0, 1.0)))
    assert advantage_B[5] == 0.0
    assert np.isfinite(advantage_B).all()
    others_B = LARGE_B.copy()
    others_B[5] = 1e9
    np.testing.assert_array_equal(rule(two_rewards(holed_B, others_B, (1.0, 1.0))), advantage_B)


def test_running_statistics_are_kept_for_each_reward_and_survive_a_checkpoint() -> None:
    first, memory = two_rewards(SMALL_B, LARGE_B, (1.0, 1.0)), Memory()
    standardised(first, memory, "prompt")
    facts = json.loads(json.dumps(memory.facts()))
    assert set(facts["statistics_by_reward"]) == {"small", "large"}
    again = Memory()
    again.load(facts, {})
    second = two_rewards(SMALL_B[::-1], LARGE_B[::-1], (1.0, 1.0))
    np.testing.assert_array_equal(
        standardised(second, again, "prompt", min_count=5),
        standardised(second, memory, "prompt", min_count=5),
    )
    old = {"statistics": {"7": [1.0, 2.0]}, "earlier": []}
    again.load(old, {})
    assert again.statistics_of("total").state_dict() == {"7": [1.0, 2.0]}
