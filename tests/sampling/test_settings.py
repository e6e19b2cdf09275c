"""What a sample file says of its cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.models import Model
from rlalign.core.registry import UserError, build
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


def spread(sampler: dict[str, Any]) -> Sample:
    runtime = {"rollout": {"shard": 2}}
    reward = [{"name": "bradley_terry"}]
    return parse_sample({**SETTINGS, "sampler": sampler, "rewards": reward, "runtime": runtime})


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "edict"},
        {"name": "doodl"},
        {"name": "training_free", "rho": 0.1},
        {"name": "classifier_guidance", "of": "reward"},
    ],
)
def test_a_method_that_needs_the_whole_denoiser_is_not_spread(sampler: dict[str, Any]) -> None:
    message = f"runtime.rollout.shard must be 1 for sampler {sampler['name']} as it is set, got 2"
    with pytest.raises(UserError, match=message):
        spread(sampler)
    assert spread({"name": "classifier_guidance"}).runtime.rollout.shard == 2


def test_a_model_is_spread_where_that_can_be() -> None:
    """A frozen pipeline of transformer blocks, and an adapter on one."""
    recipe: Any = build("policies", {"name": "flux", "path": "some/flux"})
    model = Model(title="flux", recipe=recipe)
    model.refuse_spread(2)
    trained = replace(model, run_folder=Path("runs/first"))
    with pytest.raises(UserError, match=r"shard must be 1 where all weights are trained, got 2"):
        trained.refuse_spread(2)
    replace(trained, recipe=recipe.model_copy(update={"lora_rank": 2})).refuse_spread(2)
    with pytest.raises(UserError, match=r"shard must be 1 for policy tiny, whose denoiser"):
        Model(title="tiny", recipe=build("policies", {"name": "tiny"})).refuse_spread(2)
