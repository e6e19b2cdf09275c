"""The records: frozen, checked where a wrong number would pass unseen, and sliced without changing a mean."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlalign import records
from rlalign.records import Plan, Scored, StepBatch, Trajectory, Unit, UnitKey, with_prompts
from rlalign.registry import explain

UNIT = Unit(
    key=UnitKey("train", 3, 1), prompts=("a", "a", "b"), prompt_ids=(1, 1, 2), sample_ids=(0, 1, 0), seed=7, plan=Plan()
)


def trajectory(**changes):
    fields = {
        "unit": UNIT,
        "policy_version": 0,
        "latents_BK1": np.zeros((3, 3, 2, 1, 1), dtype=np.float16),
        "log_prob_BK": np.zeros((3, 2), dtype=np.float32),
        "stochastic_K": np.array([True, False]),
    }
    return Trajectory(**{**fields, **changes})


def batch_of(masks, sizes):
    """A StepBatch with one unit per mask; log-probs are a running number, so that slices can be told apart."""
    units, number = [], 0
    log_prob = []
    for index, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
        units.append(
            Unit(
                key=UnitKey("train", 1, index),
                prompts=("p",) * size,
                prompt_ids=(1,) * size,
                sample_ids=tuple(range(size)),
                seed=0,
                plan=Plan(steps=len(mask)),
            )
        )
        log_prob.append(torch.arange(number, number + size * len(mask), dtype=torch.float32).reshape(size, len(mask)))
        number += size * len(mask)
    return StepBatch(
        units=tuple(units),
        latents=tuple(
            torch.full((s, len(m) + 1, 1, 1, 1), float(i)) for i, (m, s) in enumerate(zip(masks, sizes, strict=True))
        ),
        log_prob=tuple(log_prob),
        stochastic=tuple(torch.tensor(m) for m in masks),
        advantage=tuple(torch.arange(s, dtype=torch.float32) for s in sizes),
    )


@pytest.mark.parametrize(
    "record", [r for r in vars(records).values() if dataclasses.is_dataclass(r) and isinstance(r, type)]
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
        ({"rule": "dimm"}, "plan.rule must be 'ddim', 'ddpm', 'flow_ode' or 'flow_sde', got 'dimm'"),
        ({"step": 3}, "plan.step: unknown setting; did you mean 'steps'?"),
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
        with pytest.raises(AssertionError, match="log_prob must be float32, got float"):
            trajectory(log_prob_BK=np.zeros((3, 2), dtype=kind))
    assert trajectory().latents_BK1.dtype == np.float16, "latents may be"


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


def test_picking_keeps_whole_units_in_order():
    batch = batch_of([[True], [True], [True]], [2, 3, 4])
    picked = batch.pick([2, 0])
    assert len(batch) == 9
    assert len(picked) == 6
    assert [u.key.index for u in picked.units] == [2, 0]
    assert [int(t.flatten()[0]) for t in picked.latents] == [2, 0]
    assert [len(t) for t in picked.log_prob] == [len(t) for t in picked.advantage] == [4, 2]


@pytest.mark.parametrize("steps_per_pass", [1, 2, 3, 10])
def test_the_weighted_sum_of_slice_means_is_the_mean_over_pairs(steps_per_pass):
    """Whatever the slicing, with units of different sizes and different deterministic steps."""
    masks = [[True, True, False, True, True], [False, True, True, False, False], [True] * 5]
    batch = batch_of(masks, [2, 3, 1])
    passes = list(batch.passes(steps_per_pass))
    assert sum(p.weight for p in passes) == pytest.approx(1.0, abs=1e-12)
    assert all(1 <= len(p.steps) <= steps_per_pass for p in passes)
    pairs = torch.cat([t[:, m].flatten() for t, m in zip(batch.log_prob, batch.stochastic, strict=True)])
    found = sum(p.weight * p.log_prob_BS.double().mean().item() for p in passes)
    assert found == pytest.approx(pairs.double().mean().item(), abs=1e-12)


def test_a_pass_is_a_slice_of_one_unit():
    batch = batch_of([[True, False, True], [True, True, True]], [2, 1])
    passes = list(batch.passes(2))
    assert [(p.unit.key.index, p.steps) for p in passes] == [(0, (0, 2)), (1, (0, 1)), (1, (2,))]
    first = passes[0]
    assert torch.equal(first.log_prob_BS, batch.log_prob[0][:, [0, 2]])
    assert first.latents_BK1 is batch.latents[0]
    assert first.advantage_B is batch.advantage[0]
    assert [p.weight for p in passes] == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_without_a_density_there_is_nothing_to_learn():
    assert list(batch_of([[False, False]], [2]).passes(1)) == []
