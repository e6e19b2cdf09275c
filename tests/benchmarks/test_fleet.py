"""The model against what the real runtime took, as ``fleet.json`` has it."""

from __future__ import annotations

import pytest

from benchmarks import fleet
from benchmarks.fleet_costs import SIZES, costs_of, load

MEASURED = load()


@pytest.mark.parametrize(
    "one", MEASURED["played"], ids=lambda one: f"{one['title']}, {one['workers']} workers"
)
def test_the_model_is_within_a_tenth_of_the_real_runtime(one):
    assert fleet.modelled(MEASURED, one)[-1] == pytest.approx(one["ends"][-1], rel=0.1)


def test_every_size_was_measured_and_played():
    sizes = {int(size) for size in MEASURED["workers"]}
    assert sizes <= set(SIZES)
    assert {one["workers"] for one in MEASURED["played"]} == sizes


def test_costs_lie_between_those_of_measured_sizes():
    small, between, large = (costs_of(MEASURED, workers) for workers in (16, 32, 64))
    for name in ("order", "answer", "hop", "fetch"):
        ends = sorted([getattr(small, name), getattr(large, name)])
        assert ends[0] <= getattr(between, name) <= ends[1]
    far = costs_of(MEASURED, 10_000)
    assert (far.call, far.answer) == (large.call, large.answer)
    assert 0 <= far.member < 1e-6  # s a member: nobody is searched for one by one
