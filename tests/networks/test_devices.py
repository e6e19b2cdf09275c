"""Which device computes what, and what is said where this machine does not have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlalign.alignment.collect import LocalCollect
from rlalign.cli import main
from rlalign.config import Run
from rlalign.core.registry import UserError
from rlalign.networks import devices
from rlalign.policies.base import PolicyRecipe
from rlalign.rewards.base import Reward, Scorer
from tests.runs import CONFIGS, small_run
from tests.toy import ToyFamily

LOADED: list[str] = []


class NotedPolicy(PolicyRecipe):
    """The toy policy, which notes where it was to be loaded, and stays on the CPU. Source: none, a
    test's own."""

    family = ToyFamily

    def build(self, device: str) -> ToyFamily:
        LOADED.append(f"policy {device}")
        return ToyFamily()


class NotedReward(Reward):
    """A reward that notes where it was to be loaded. Source: none, a test's own."""

    def load(self, device: str) -> Scorer:
        LOADED.append(f"reward {device}")

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return media_BFCHW.mean((1, 2, 3, 4))

        return scorer


def noted(*overrides: str) -> Run:
    LOADED.clear()
    policy, reward = (
        "policy={name: 'tests.networks.test_devices:NotedPolicy'}",
        "{name: 'tests.networks.test_devices:NotedReward'}",
    )
    return small_run(policy, f"rewards=[{reward}]", *overrides)


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        (
            "cuda",
            0,
            (
                "here must be cpu on a machine without CUDA, got cuda; set it to cpu, or go where a"
                " GPU is"
            ),
        ),
        (
            "cuda:2",
            2,
            "here must be at most cuda:1 on this machine, got cuda:2; GPUs are counted from 0",
        ),
        ("cuda:1", 2, ""),
        ("cpu", 0, ""),
    ],
)
def test_what_a_machine_lacks_is_said(
    device: str, count: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: count)
    assert devices.lacking(device, "here") == message
    if message:
        with pytest.raises(UserError, match=message):
            devices.usable(device, "here")
    else:
        assert devices.usable(device, "here") == device


@pytest.mark.parametrize(
    ("settings", "loaded"),
    [
        ([], {"policy cpu", "reward cpu"}),
        (["runtime.device=cuda"], {"policy cuda", "reward cpu"}),
        (["runtime.device=cuda", "runtime.reward.gpus=0.25"], {"policy cuda", "reward cuda"}),
        (["runtime.reward.gpus=0.25"], {"policy cpu", "reward cpu"}),
    ],
)
def test_each_role_has_one_device_in_one_process_and_on_ray(
    settings: list[str], loaded: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards are on the GPU where they reserve one; rollout and learner, whose log-probs are
    compared, never differ."""
    from rlalign.alignment.assemble import build_learner
    from rlalign.runtime.training.fleet import policy_source
    from rlalign.runtime.workers import PolicyWorker, RewardWorker

    monkeypatch.setattr(devices, "gpus", lambda: 1)
    run = noted(*settings)
    LocalCollect(run)
    build_learner(run)
    assert set(LOADED) == loaded
    LOADED.clear()
    PolicyWorker(policy_source(run), "rollout 0")
    RewardWorker(run.rewards[0], run.runtime.reward_device, 1, "reward 0")
    assert set(LOADED) == loaded


def test_what_fleet_and_sampling_give_their_reward_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device goes to each actor with its reward, as the settings say."""
    from rlalign.runtime import sampling as sample
    from rlalign.runtime.roles import reward_role
    from rlalign.runtime.training import fleet

    given: list[tuple[object, ...]] = []

    class Actor:
        def options(self, **_: object) -> Actor:
            return self

        def remote(self, *arguments: object) -> str:
            given.append(arguments)
            return "an actor"

    monkeypatch.setattr("ray.remote", lambda **_: lambda cls: Actor())
    run = noted("runtime.device=cuda", "runtime.rollout.gpus=1")
    made = object.__new__(fleet.Fleet)
    made.__dict__ |= {
        "_run": run,
        "owner": "",
        "places_are_cores": True,
        "_rewards": {reward_role("x"): run.rewards[0]},
    }
    made._worker(reward_role("x"), 0)
    assert given[-1][1] == "cpu"
    from rlalign.sampling import parse_sample

    settings = {
        "name": "s",
        "policy": {"name": "tiny"},
        "prompts": {"name": "shapes"},
        "rewards": [{"name": "jpeg"}],
    }
    some = parse_sample(
        {
            **settings,
            "sampler": {"name": "plain"},
            "runtime": {"device": "cuda", "reward": {"gpus": 0.25}},
        }
    )
    sample.create_actors(some)
    assert [g[1] for g in given if len(g) == 4 and isinstance(g[1], str)] == ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        (
            ["train", str(CONFIGS / "quickstart.yaml"), "runtime.device=cuda", "--local"],
            "runtime.device",
        ),
        (
            ["sample", str(CONFIGS / "sample_demon.yaml"), "runtime.device=cuda", "--local"],
            "runtime.device",
        ),
        (["evaluate", "tiny", "runtime.device=cuda"], "runtime.device"),
        (["fit-reward", str(CONFIGS / "fit_tiny_reward.yaml"), "device=cuda"], "device"),
    ],
)
def test_every_command_says_so_and_leaves_nothing_behind(
    command: list[str],
    setting: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: 0)
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {setting} must be cpu on a machine without CUDA, got cuda; ")
    assert not (tmp_path / "out").exists()


@pytest.mark.promise
def test_check_refuses_what_runs_nowhere_and_says_what_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = ["check", str(CONFIGS / "quickstart.yaml"), "runtime.device=cuda"]
    monkeypatch.setattr(devices, "gpus", lambda: 0)
    assert main(check) == 2
    said = capsys.readouterr().err
    assert "runtime.device must be cpu on a machine without CUDA, got cuda" in said
    assert "on a cluster runtime.rollout.gpus must be > 0" in said and said.count("\n") == 1
    assert (
        main([*check, "runtime.rollout.gpus=0.5", "runtime.learner.gpus=0.5"]) == 0
    )  # for a cluster
    out = capsys.readouterr().out
    assert "policies on cuda, rewards on cpu" in out
    assert (
        "here it is refused: runtime: 1 learner worker, 2 rollout workers found no place on this"
        " machine" in out
    )
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    monkeypatch.setattr(devices, "gpu_memory", lambda: 80_000_000_000)
    assert main(check) == 0  # with --local
    assert "refused: runtime.rollout.gpus must be > 0 on Ray" in capsys.readouterr().out
