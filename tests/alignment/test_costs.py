"""What rounds are counted to cost, against the policy's own count of what it was asked."""

from __future__ import annotations

from typing import Any

import pytest

from rlalign.alignment import costs
from rlalign.alignment.assemble import build_learner, differentiable_scorer
from rlalign.alignment.collect import LocalCollect
from rlalign.config import Run, parse_run
from rlalign.core.batches import PromptBatch


def run_of(
    algorithm: dict[str, Any], *, guidance: float = 1.0, epochs: int = 1, reward: str = "centroid"
) -> Run:
    return parse_run(
        {
            "name": "cost",
            "policy": {"name": "points"},
            "plan": {"steps": 3, "guidance": guidance},
            "prompts": {
                "name": "list",
                "prompts": ["left", "right"],
                "per_round": 2,
                "samples_per_prompt": 2,
                "per_unit": 1,
            },
            "rewards": [{"name": reward}],
            "algorithm": algorithm,
            "learner": {"updates_per_round": 1, "epochs": epochs},
        }
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_costs_what_the_policy_was_asked(guidance: float) -> None:
    run, counts = (
        run_of({"name": "ddpo", "advantage": "group"}, guidance=guidance),
        costs.NONE.copy(),
    )
    collect = LocalCollect(run)
    collect.gather(collect.order(run.prompts.units(0, 1, run.plan), build_learner(run).weights()))
    costs.add(counts, run, {}, updates=1)
    assert counts == {
        "samples": 4,
        "denoiser_calls": collect.cost.denoiser_calls,
        "reward_queries": 4,
    }
    assert counts["denoiser_calls"] == 4 * 3 * (1 if guidance == 1.0 else 2)


@pytest.mark.parametrize("form", ["draft", "refl"])
@pytest.mark.parametrize(("resamples", "epochs"), [(0, 1), (2, 1), (0, 2)])
def test_backpropagation_counts_the_calls_and_queries_of_its_updates(
    form: str, resamples: int, epochs: int
) -> None:
    if form == "refl" and resamples:
        resamples = 0
    run = run_of({"name": "reward_backprop", "form": form, "resamples": resamples}, epochs=epochs)
    learner, counts = build_learner(run), costs.NONE.copy()
    units = tuple(run.prompts.units(0, 1, run.plan))
    batch = PromptBatch(units=units, scorer=differentiable_scorer(run, "cpu"))
    learned = learner.update(batch, round=1)
    costs.add(counts, run, learned, updates=learner.version)
    assert counts["denoiser_calls"] == learner.policy.meter.calls > 0
    assert counts["reward_queries"] == 4 * epochs * (resamples or 1)


def test_a_set_of_preferences_costs_nothing() -> None:
    run, counts = run_of({"name": "diffusion_dpo"}), costs.NONE.copy()
    fixed = run.model_copy(update={"preferences": object()})
    costs.add(counts, fixed, {}, updates=1)
    assert counts == costs.NONE
