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

PATHS = {
    "epsilon": {"rule": "ddim", "eta": 1.0},
    "v_prediction": {"rule": "ddim", "eta": 1.0},
    "flow": {"rule": "flow_sde", "eta": 0.7},
}
"""Prediction type -> plan of a chain to learn from."""
ODE = {
    "epsilon": {"rule": "ddim", "eta": 0.0},
    "v_prediction": {"rule": "ddim", "eta": 0.0},
    "flow": {"rule": "flow_ode", "eta": 0.0},
}
"""The same of a chain without noise of its own."""

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "sdxl": ({}, "epsilon"),
    "sd35": ({"name": "sd3", "t5_tokens": 16}, "flow"),
    "flux": ({"text_tokens": 16, "precision": "bfloat16"}, "flow"),
    "ltx": ({"text_tokens": 24}, "flow"),
    "hunyuan_video": ({"text_tokens": 352}, "flow"),
    "cogvideox": ({}, "v_prediction"),
    # the template alone is 115 of the small tokenizer's letters
    "qwen_image": ({"text_tokens": 144}, "flow"),
    "wan22": ({"name": "wan", "text_tokens": 24}, "flow"),
}
"""Random model -> settings of its policy, and its prediction type."""
SIZES: dict[str, dict[str, int]] = {
    "ltx": {"height": 32, "width": 32, "frames": 9},
    "hunyuan_video": {"height": 32, "width": 32, "frames": 5},
    "wan": {"frames": 5},
    "cogvideox": {"height": 16, "width": 16, "frames": 9},
}
"""Policy of clips -> what it draws."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo": {"name": "ddpo"},
    "grpo": {"name": "grpo"},
    "nft": {"name": "diffusion_nft", "draws": 2},
    "dpo": {"name": "diffusion_dpo", "draws": 2},
    "dpok": {"name": "dpok", "value_lr": 0.001},
    "draft": {"name": "reward_backprop", "last_steps": 1},
}
WITHOUT_LIKELIHOODS = ("nft", "dpo")
"""Algorithms that learn from final pictures, however they were drawn."""


def policy_of(name: str, folder: Path) -> dict[str, Any]:
    """The policy that reads the random model of a name in ``folder``."""
    return {"name": name, "path": str(folder), **SETTINGS[name][0]}


def run_of_pair(name: str, algorithm: str, folder: Path) -> Run:
    """The small run of a random model, which lies in ``folder``, with an algorithm."""
    prediction = SETTINGS[name][1]
    plan: dict[str, Any] = PATHS[prediction]
    if algorithm in WITHOUT_LIKELIHOODS:
        plan = {**ODE[prediction], "guidance": 1.0}
    # gradients pass the shipped reward model
    reward = "bradley_terry" if algorithm == "draft" else "jpeg"
    return run_of(policy_of(name, folder), plan, ALGORITHMS[algorithm], reward)


def run_of(
    policy: dict[str, Any], plan: dict[str, Any], algorithm: dict[str, Any], reward: str = "jpeg"
) -> Run:
    """Two rounds of four pictures of 16 x 16 pixels, or clips, two updates each; a LoRA is
    trained."""
    size = {"height": 16, "width": 16, **SIZES.get(policy["name"], {})}
    return parse_run(
        {
            "name": "small",
            "rounds": 2,
            "policy": {**policy, "lora_rank": 2},
            "plan": {"steps": 2, "guidance": 2.0, **plan, **size},
            "prompts": {
                "name": "list",
                "prompts": ["a red circle", "blue", "a green square above two circles"],
                "per_round": 2,
                "per_unit": 1,
                "samples_per_prompt": 2,
            },
            "rewards": [{"name": reward}],
            "algorithm": algorithm,
            "learner": {"lr": 0.01, "updates_per_round": 2},
            "evaluate": {"prompts": 2, "grid": 2},
            "runtime": {"rollout": {"workers": 1}},
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
    size = {"height": 16, "width": 16, **SIZES.get(policy["name"], {})}
    settings = {
        "name": "small",
        "policy": policy,
        "plan": {"steps": 3, "guidance": 2.0, **plan, **size},
        "prompts": {"name": "list", "prompts": ["a red circle", "blue"]},
        "pictures": 2,
        "rewards": [{"name": "jpeg"}],
        "sampler": sampler,
        "rows": 2,
    }
    return sample_local(parse_sample(settings), folder, quiet)
