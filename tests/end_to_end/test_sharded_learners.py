"""Learners on Ray that share one denoiser: bitwise the run of a whole one where it is frozen, of
an undisturbed group where it is trained; also where one of them dies while another waits for its
part of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlalign.alignment.loop import train_local
from rlalign.config import Run
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.runtime import train_on_ray
from tests.policies.family_runs import PATHS, policy_of, run_of
from tests.runs import assert_same_run, final_tensors, metrics, quiet

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("without_report")]

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


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small FLUX, beside a learner that dies."""
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    write_pipeline(tmp_path / "model", FAMILIES["flux"], seed=1)
    return tmp_path / "model"


def test_two_learners_that_share_a_denoiser_equal_a_whole_one_though_one_dies(
    model: Path, tmp_path: Path
) -> None:
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


def test_two_learners_that_hold_a_part_each_equal_two_of_which_one_dies(
    model: Path, tmp_path: Path
) -> None:
    """All weights are trained; the workers draw under weights that the learners have published in
    parts. What is exported is the last checkpoint's average, to the last bit."""
    mark = tmp_path / "mark"
    calm = trains_all(run_with(model, {"name": "grpo"}, workers=2, shard="all"))
    train_on_ray(calm, tmp_path / "calm", resume=False, on_record=quiet)
    dying = run_with(model, {"name": "dying:Dying", "mark": str(mark)}, workers=2, shard="all")
    train_on_ray(trains_all(dying), tmp_path / "killed", resume=False, on_record=quiet)
    assert mark.stat().st_size > 3, "the second learner did not go on after its death"
    assert_same_run(tmp_path / "calm", tmp_path / "killed")

    # a whole learner has the same rewards and gradients, but for rounding, in the first round; what
    # is drawn after it is drawn under weights that are apart by a bfloat16's last bit
    whole = trains_all(run_with(model, {"name": "grpo"}, workers=1, shard="none"))
    train_local(whole, tmp_path / "whole", resume=False, on_record=quiet)
    mine = metrics(tmp_path / "calm")[0]
    its = metrics(tmp_path / "whole")[0]
    assert mine["reward/total/mean"] == its["reward/total/mean"]
    assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=0.01)
    exported = load_file(
        tmp_path / "calm" / "policy" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    final = final_tensors(tmp_path / "calm")
    assert all(torch.equal(exported[name], final[f"average/{name}"]) for name in exported)


def trains_all(run: Run) -> Run:
    """The run with all weights of its denoiser trained, and their average kept."""
    return run.model_copy(
        update={
            "policy": run.policy.model_copy(update={"lora_rank": 0}),
            "learner": run.learner.model_copy(update={"ema_decay": 0.9, "lr": 1e-3}),
        }
    )
