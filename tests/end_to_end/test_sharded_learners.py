"""Learners on Ray that share one denoiser: bitwise the run of a whole one, also where one of them
dies while another waits for its part of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import Run
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime import train_on_ray
from tests.policies.family_runs import PATHS, policy_of, run_of
from tests.runs import assert_same_run, quiet

pytestmark = [pytest.mark.ray, pytest.mark.promise, pytest.mark.usefixtures("without_report")]

DYING = """
import os
from rlalign.algorithms.grpo import GRPO

class Dying(GRPO):
    \"\"\"GRPO in which the second learner's process ends in the third pass, once.

    Source: none.
    \"\"\"

    mark: str = ""

    def loss(self, batch, policy):
        if os.environ.get("RANK") == "1":
            with open(self.mark, "a") as file:
                file.write(".")
            if os.path.getsize(self.mark) == 3:
                os.kill(os.getpid(), 9)
        return super().loss(batch, policy)
"""


def run_with(folder: Path, algorithm: dict[str, object], *, workers: int, shard: str) -> Run:
    run = run_of(policy_of("flux", folder), PATHS["flow"], {"kl_weight": 0.1, **algorithm})
    learner = run.runtime.learner.model_copy(update={"workers": workers})
    return run.model_copy(
        update={
            "learner": run.learner.model_copy(update={"shards": 2, "shard": shard}),
            "checkpoint": run.checkpoint.model_copy(update={"every": 1}),
            "runtime": run.runtime.model_copy(update={"learner": learner}),
        }
    )


def test_two_learners_that_share_a_denoiser_equal_a_whole_one_though_one_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = tmp_path / "model"
    write_pipeline(model, FAMILIES["flux"], seed=1)
    train_local(
        run_with(model, {"name": "grpo"}, workers=1, shard="base"),
        tmp_path / "whole",
        resume=False,
        on_record=quiet,
    )
    mark = tmp_path / "mark"
    run = run_with(model, {"name": "dying:Dying", "mark": str(mark)}, workers=2, shard="base")
    train_on_ray(run, tmp_path / "spread", resume=False, on_record=quiet)
    assert mark.stat().st_size > 3, "the second learner did not go on after its death"
    assert_same_run(tmp_path / "whole", tmp_path / "spread")
