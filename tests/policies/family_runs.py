"""Small runs on small random pipelines: two rounds of training, and pictures without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.alignment.loop import train_local
from rlalign.config import Run, parse_run
from rlalign.sampling import parse_sample, sample_local
from tests.runs import final_tensors, metrics, quiet

PATHS = {"epsilon": {"rule": "ddim", "eta": 1.0}, "flow": {"rule": "flow_sde", "eta": 0.7}}
"""Prediction type -> plan of a chain to learn from."""


def run_of(
    policy: dict[str, Any], plan: dict[str, Any], algorithm: dict[str, Any], reward: str = "jpeg"
) -> Run:
    """Two rounds of eight pictures of 16 x 16 pixels, two updates each; a LoRA is trained."""
    return parse_run(
        {
            "name": "small",
            "rounds": 2,
            "policy": {**policy, "lora_rank": 2},
            "plan": {"steps": 2, "guidance": 2.0, "height": 16, "width": 16, **plan},
            "prompts": {
                "name": "list",
                "prompts": ["a red circle", "blue", "a green square above two circles"],
                "per_round": 4,
                "per_unit": 2,
                "samples_per_prompt": 2,
            },
            "rewards": [{"name": reward}],
            "algorithm": algorithm,
            "learner": {"lr": 0.01, "shards": 2, "updates_per_round": 2},
            "evaluate": {"prompts": 2, "grid": 2},
        }
    )


def train_two_rounds(run: Run, folder: Path) -> None:
    """Trains in this process, and checks that a round moved the weights, with a ratio of 1
    before."""
    train_local(run, folder, resume=False, on_record=quiet)
    lines = metrics(folder)
    assert [line["round"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["reward/total/mean"]) for line in lines)
    assert max(line["grad_norm"] for line in lines) > 0
    assert lines[0].get("ratio/first_update", 0.0) == 0.0
    after = final_tensors(folder)
    before = run.policy.load("cpu").weights()
    assert any(not torch.equal(after[f"policy/{name}"], weight) for name, weight in before.items())


def sample_of(
    policy: dict[str, Any], plan: dict[str, Any], sampler: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Two pictures of a test-time sampler, and what they cost."""
    settings = {
        "name": "small",
        "policy": policy,
        "plan": {"steps": 3, "guidance": 2.0, "height": 16, "width": 16, **plan},
        "prompts": {"name": "list", "prompts": ["a red circle", "blue"]},
        "pictures": 2,
        "rewards": [{"name": "jpeg"}],
        "sampler": sampler,
        "rows": 2,
    }
    return sample_local(parse_sample(settings), folder, quiet)
