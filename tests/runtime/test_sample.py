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
from rlalign.samplers.fk_steering import FkSteering

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


class KillsARolloutWorker(FkSteering):
    """FK steering that kills a worker of its own pool, once, in the middle. Source: none, a test's own."""

    marker: str = ""

    def _weighs(self, k: int, steps: int) -> bool:
        import ray

        if k == 2 and ray.is_initialized() and not Path(self.marker).exists():
            Path(self.marker).touch()
            name = min(n for n in ray.util.list_named_actors() if "/rollout" in n)
            os.kill(ray.get(ray.get_actor(name).process_id.remote(), timeout=60), signal.SIGKILL)
        return super()._weighs(k, steps)


def brightness_or_death(media_BFCHW: torch.Tensor, prompts: list[str], marker: str) -> torch.Tensor:
    """The mean of a picture; the second question kills the process that is asked."""
    place = Path(marker)
    asked = place.with_name(f"{place.name}.asked")
    if asked.exists() and not place.exists():
        place.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    asked.touch()
    return media_BFCHW.flatten(1).mean(1)


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


def test_a_rollout_and_a_reward_worker_that_die_change_nothing(tmp_path: Path) -> None:
    sampler = {**SETTINGS["sampler"], "name": "tests.runtime.test_sample:KillsARolloutWorker"}
    sampler["marker"] = str(tmp_path / "killed")
    died = tmp_path / "died"
    call = {"call": "tests.runtime.test_sample:brightness_or_death", "arguments": {"marker": str(died)}}
    settings = {"sampler": sampler, "rewards": [{"name": "function", **call}]}
    on_ray(tmp_path / "ray", **settings)
    assert (tmp_path / "killed").exists()
    assert died.exists()
    in_process(tmp_path / "local", **settings)
    assert_same(tmp_path / "ray", tmp_path / "local")


def test_the_gradient_of_a_reward_in_another_process_is_the_one_of_this_process(tmp_path: Path) -> None:
    """A sampler that lives off gradients comes to the same bits when the pictures' gradient comes from the reward pool."""
    settings = {
        "rewards": [{"name": "bradley_terry", "label": "fitted"}],
        "sampler": {"name": "twisted_smc", "particles": 2, "strength": 1.0},
    }
    on_ray(tmp_path / "ray", **settings)
    in_process(tmp_path / "local", **settings)
    assert_same(tmp_path / "ray", tmp_path / "local")


def test_a_users_mistake_in_a_reward_worker_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this reward wants other pictures; give it some"):
        on_ray(tmp_path / "ray", rewards=[{"name": "function", "call": "tests.runtime.test_sample:bad_input"}])
