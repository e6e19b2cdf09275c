"""Sampling on real Ray actors: bitwise that of one process, with dying workers too; a reward's
gradient crosses processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rlalign
from rlalign.core.registry import UserError
from rlalign.runtime import sample_on_ray
from rlalign.samplers.twisted_smc import TwistedSmc
from rlalign.sampling import sample_local
from rlalign.sampling.settings import parse_sample
from tests.processes import kill_first

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
    "runtime": {"rollout": {"workers": 2}, "reward": {"workers": 1}},
}


class KillsWorkers(TwistedSmc):
    """Twisted SMC that kills a rollout worker and a reward worker of its own pools, once each.
    Source: none, a test's own."""

    marker: str = ""

    def _tempered(self, k: int) -> float:
        import ray

        role = {1: "rollout", 2: "reward"}.get(k)
        place = Path(f"{self.marker}-{role}")
        if role and ray.is_initialized() and not place.exists():
            place.touch()
            kill_first(role)
        return super()._tempered(k)


def bad_input(media_BFCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    raise UserError("rewards.function: this reward wants other pictures; give it some")


def on_ray(folder: Path, address: str | None = None, **settings: Any) -> dict[str, Any]:
    return sample_on_ray(
        parse_sample({**SETTINGS, **settings}), folder, lambda record: None, address=address
    )


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
    pictures = [
        [np.asarray(Image.open(p)) for p in sorted(f.glob("pictures/*.png"))]
        for f in (first, second)
    ]
    assert len(pictures[0]) == 3
    for one, other in zip(*pictures, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def head_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray whose processes are in another folder than the commands."""
    import ray

    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        elsewhere.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.mark.promise
def test_workers_that_die_and_rewards_in_other_processes_change_nothing(
    head_elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that lives off gradients: the reward pool differentiates the pictures, and one
    worker of each pool is killed.

    Model, prompts and reward are named from the command's folder, which is not that of Ray's
    processes.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny_reward"):
        shutil.copytree(Path(rlalign.__file__).parent / "assets" / name, tmp_path / f"a_{name}")
    (tmp_path / "prompts.txt").write_text(
        "a red circle\na blue square\na green triangle\n", encoding="utf-8"
    )
    settings = {
        "policy": "a_tiny",
        "prompts": {"name": "file", "path": "prompts.txt"},
        "rewards": [{"name": "bradley_terry", "label": "fitted", "path": "a_tiny_reward"}],
        "sampler": {
            "name": "tests.runtime.test_sampling:KillsWorkers",
            "particles": 2,
            "strength": 1.0,
            "marker": str(tmp_path / "killed"),
        },
    }
    on_ray(tmp_path / "ray", head_elsewhere, **settings)
    assert (tmp_path / "killed-rollout").exists()
    assert (tmp_path / "killed-reward").exists()
    in_process(tmp_path / "local", **settings)
    assert_same(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "the weights of its unet"), (3e38, "unet: gives numbers that are not finite")],
)
def test_a_denoiser_that_is_not_finite_is_one_message(
    tmp_path: Path, value: float, message: str
) -> None:
    """Refused when a worker begins."""
    from tests.pipelines import spoil
    from tests.toy import save_pipeline

    folder = spoil(save_pipeline(tmp_path / "pipeline"), "unet", "conv_out.weight", value)
    with pytest.raises(UserError, match=message):
        on_ray(
            tmp_path / "ray",
            policy=str(folder),
            rewards=[{"name": "jpeg"}],
            prompts={"name": "list", "prompts": ["a"]},
            pictures=1,
        )


@pytest.mark.slow
def test_a_users_mistake_in_a_reward_worker_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this reward wants other pictures; give it some"):
        on_ray(
            tmp_path / "ray",
            rewards=[{"name": "function", "call": "tests.runtime.test_sampling:bad_input"}],
        )
