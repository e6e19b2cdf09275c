"""A run whose rollout worker is two processes that share its denoiser, of which each dies once:
bitwise the run of whole workers that nobody disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import Run
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime import train_on_ray
from tests.policies.family_runs import PATHS, policy_of, run_of
from tests.runs import assert_same_run, quiet

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("without_report")]


def run_with(folder: Path, *, shard: int) -> Run:
    """Three rounds of three units."""
    run = run_of(policy_of("flux", folder), PATHS["flow"], {"name": "grpo", "kl_weight": 0.1})
    rollout = run.runtime.rollout.model_copy(update={"shard": shard})
    return run.model_copy(
        update={
            "rounds": 3,
            "prompts": run.prompts.model_copy(update={"per_round": 3}),
            "learner": run.learner.model_copy(update={"updates_per_round": 1}),
            "runtime": run.runtime.model_copy(update={"rollout": rollout}),
        }
    )


def rollout_processes() -> list[int]:
    """Of the run's worker: the lead's process, and the other's."""
    import ray

    (name,) = [name for name in ray.util.list_named_actors() if "/rollout-" in name]
    lead: Any = ray.get_actor(name)
    return ray.get(
        lead.apply.remote(
            lambda group: [os.getpid(), ray.get(group._others[0].process_id.remote())]
        )
    )


def test_a_run_with_a_worker_of_two_processes_equals_a_whole_one_though_each_dies(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    write_pipeline(model, FAMILIES["flux"], seed=1)
    train_local(run_with(model, shard=1), tmp_path / "whole", resume=False, on_record=quiet)
    killed = []

    def kill(record: dict[str, Any]) -> None:
        """The other process after the first round, the lead after the second."""
        place = {1: 1, 2: 0}.get(record.get("round", 0))
        if place is not None and "reward/total/mean" in record:
            process = rollout_processes()[place]
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    train_on_ray(run_with(model, shard=2), tmp_path / "spread", resume=False, on_record=kill)
    assert len(set(killed)) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "spread")
