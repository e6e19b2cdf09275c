"""What a sample file says of its cost."""

from __future__ import annotations

import pytest

from rlalign.sampling.settings import Sample, parse_sample
from tests.sampling.test_compare import SETTINGS


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 1), (3.0, 2)])
def test_a_look_costs_what_the_family_asks_of_each_model(guidance: float, calls: int) -> None:
    """Between an aligned policy and its base both are asked; a budget is counted in calls."""
    plan = {"steps": 4, "eta": 1.0, "guidance": guidance}
    sample = parse_sample({**SETTINGS, "plan": plan, "budget": {"denoiser_calls": 80}})
    assert sample.calls_per_look == calls
    assert sample.method.n == 80 // (4 * calls)  # type: ignore[attr-defined]
    between = Sample.model_copy(sample, update={"interpolation": 0.5})
    assert between.calls_per_look == 2 * calls
