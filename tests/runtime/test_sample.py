"""Sampling on real Ray actors: bitwise that of one process, with dying workers too; a reward's gradient crosses processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlalign.registry import UserError
from rlalign.runtime import sample_on_ray
from rlalign.sample import sample_local
from rlalign.sample.settings import parse_sample
from rlalign.samplers.twisted_smc import TwistedSmc

pytestmark = pytest.mark.ray

SETTINGS: dict[str, Any] = {
    "name": "some",
    "policy": {"name": "tiny"},
    "plan": {"steps": 4, "eta": 1.0},
    "prompts": {"name": "shapes"},
    "pictures": 3,
    "rewards": [{"name": "shapes"}],
    "sampler": {"name": "fk_steering", "particles": 4, "strength": 5.0},
    "rows": 3,
    "compare": False,
    "runtime": {"rollout_workers": 2, "reward_workers": 1, "recovery_seconds": 60},
}


class KillsWorkers(TwistedSmc):
    """Twisted SMC that kills a rollout worker and a reward worker of its own pools, once each. Source: none, a test's own."""

    marker: str = ""

    def _tempered(self, k: int) -> float:
        import ray

        role = {1: "rollout", 2: "reward"}.get(k)
        place = Path(f"{self.marker}-{role}")
        if role and ray.is_initialized() and not place.exists():
            place.touch()
            name = min(n for n in ray.util.list_named_actors() if f"/{role}" in n)
            os.kill(ray.get(ray.get_actor(name).process_id.remote(), timeout=60), signal.SIGKILL)
        return super()._tempered(k)


def bad_input(media_BFCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    raise UserError("rewards.function: this reward wants other pictures; give it some")


def on_ray(folder: Path, **settings: Any) -> dict[str, Any]:
    return sample_on_ray(parse_sample({**SETTINGS, **settings}), folder, lambda record: None)


def in_process(folder: Path, **settings: Any) -> dict[str, Any]:
    return sample_local(parse_sample({**SETTINGS, **settings}), folder, lambda record: None)


def assert_same(first: Path, second: Path) -> None:
    """Pictures, scores and costs, but for the seconds."""
    results = [json.loads((folder / "sample.json").read_text()) for folder in (first, second)]
    for result in results:
        for method in result["methods"]:
            del method["cost"]["seconds"]
            method["sampler"].pop("marker", None)
    assert results[0] == results[1]
    pictures = [[np.asarray(Image.open(p)) for p in sorted(f.glob("pictures/*.png"))] for f in (first, second)]
    assert len(pictures[0]) == 3
    for one, other in zip(*pictures, strict=True):
        np.testing.assert_array_equal(one, other)


def test_workers_that_die_and_rewards_in_other_processes_change_nothing(tmp_path: Path) -> None:
    """A method that lives off gradients: the reward pool differentiates the pictures, and one worker of each pool is killed."""
    settings = {
        "rewards": [{"name": "bradley_terry", "label": "fitted"}],
        "sampler": {
            "name": "tests.runtime.test_sample:KillsWorkers",
            "particles": 2,
            "strength": 1.0,
            "marker": str(tmp_path / "killed"),
        },
    }
    on_ray(tmp_path / "ray", **settings)
    assert (tmp_path / "killed-rollout").exists()
    assert (tmp_path / "killed-reward").exists()
    in_process(tmp_path / "local", **settings)
    assert_same(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
def test_a_users_mistake_in_a_reward_worker_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this reward wants other pictures; give it some"):
        on_ray(tmp_path / "ray", rewards=[{"name": "function", "call": "tests.runtime.test_sample:bad_input"}])
