"""The records: frozen, checked where a wrong number would pass unseen, and sliced without changing
a mean."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from rlalign.core import records
from rlalign.core.records import Plan, Scored, Trajectory, Unit, UnitKey, with_prompts
from rlalign.core.registry import explain

UNIT = Unit(
    key=UnitKey("train", 3, 1),
    prompts=("a", "a", "b"),
    prompt_ids=(1, 1, 2),
    sample_ids=(0, 1, 0),
    seed=7,
    plan=Plan(),
)


def trajectory(**changes):
    fields = {
        "unit": UNIT,
        "policy_version": 0,
        "latents_BK1": np.zeros((3, 3, 2, 1, 1), dtype=np.float32),
        "log_prob_BK": np.zeros((3, 2), dtype=np.float32),
        "stochastic_K": np.array([True, False]),
    }
    return Trajectory(**{**fields, **changes})


@pytest.mark.parametrize(
    "record",
    [
        r
        for r in vars(records).values()
        if isinstance(r, type) and dataclasses.is_dataclass(r) and r.__module__ == records.__name__
    ],
)
def test_records_are_frozen_and_keyword_only(record):
    assert record.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(record))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "plan.steps must be >= 1, got 0"),
        ({"steps": 1001}, "plan.steps must be <= 1000, got 1001"),
        ({"eta": -0.1}, "plan.eta must be >= 0, got -0.1"),
        ({"eta": float("nan")}, "plan.eta must be a finite number, got nan"),
        ({"guidance": float("inf")}, "plan.guidance must be a finite number, got inf"),
        ({"height": -8}, "plan.height must be >= 0, got -8"),
        ({"frames": 0}, "plan.frames must be >= 1, got 0"),
        (
            {"rule": "dimm"},
            (
                "plan.rule must be 'ddim', 'ddpm', 'flow_ode', 'flow_sde', 'flow_dance' or"
                " 'flow_cps', got 'dimm'"
            ),
        ),
        ({"step": 3}, "plan.step: unknown setting; did you mean 'steps'?"),
        (
            {"steps": 10, "window": 6},
            "plan.window must be <= 5, the first half of 10 steps, got 6; 0 makes every step noisy",
        ),
        (
            {"steps": 1, "window": 1},
            "plan.window must be <= 0, the first half of 1 steps, got 1; 0 makes every step noisy",
        ),
        (
            {"steps": 10, "window": 11, "window_place": "end"},
            "plan.window must be <= 10, the plan's steps, got 11; 0 makes every step noisy",
        ),
        (
            {"window_place": "anywhere"},
            "plan.window must be > 0 with window_place anywhere, got 0; leave window_place out",
        ),
        (
            {"eta": 0.0, "min_std": 0.1},
            (
                "plan.min_std must be 0 where steps take no noise (eta 0, or the rule flow_ode),"
                " got 0.1"
            ),
        ),
    ],
)
def test_a_plan_is_checked(settings, message):
    with pytest.raises(ValidationError) as caught:
        Plan(**settings)
    assert explain(caught.value, Plan, "plan") == message


def test_a_plan_is_frozen():
    with pytest.raises(ValidationError):
        Plan().steps = 3


def test_a_key_reads_well_and_sorts():
    assert str(UnitKey("train", 3, 12)) == "train/3/12"
    assert UnitKey("train", 3, 2) < UnitKey("train", 3, 12) < UnitKey("train", 4, 0)
    assert len({UnitKey("train", 1, 1), UnitKey("evaluate", 1, 1), UnitKey("train", 1, 1)}) == 2


def test_a_log_prob_in_half_precision_is_rejected():
    """Near |log p| = 1.4 float16 has a spacing of 9.8e-4: coarser than a clip range of 1e-4."""
    assert float(np.spacing(np.float16(1.4))) > 9e-4
    for kind in (np.float16, np.float64):
        with pytest.raises(TypeError, match="log_prob must be float32, got float"):
            trajectory(log_prob_BK=np.zeros((3, 2), dtype=kind))


def test_records_pickle():
    again = pickle.loads(pickle.dumps(trajectory()))
    assert again.unit == UNIT
    assert np.array_equal(again.latents_BK1, trajectory().latents_BK1)


def test_dropped_samples_are_not_kept():
    total_B = np.array([1.0, np.nan, np.inf], dtype=np.float32)
    scored = Scored(unit=UNIT, policy_version=0, raw={"r": total_B}, total_B=total_B)
    assert scored.kept_B.tolist() == [True, False, False]


def test_other_words_same_noise():
    other = with_prompts(UNIT, ["x", "y", "z"])
    assert other.prompts == ("x", "y", "z")
    assert dataclasses.replace(other, prompts=UNIT.prompts) == UNIT
