"""The loop in one process: what it writes, that it repeats, and that it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlalign import checkpoint, control
from rlalign.config import dump
from rlalign.loop import train_local
from rlalign.registry import UserError
from tests.runs import assert_same_run, final_tensors, metrics, small_run


def quiet(_: object) -> None:
    """No screen."""


def test_a_run_folder_is_complete(local_run: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "evaluation.json",
        "report.html",
        "policy",
        "tensorboard",
    ):
        assert (local_run / name).exists(), name
    assert sorted(p.name for p in (local_run / "checkpoints").iterdir()) == ["round-00002", "round-00004"]
    assert {p.name for p in (local_run / "samples").glob("round-*.png")} >= {"round-00000.png", "round-00004.png"}
    contract = {
        "round",
        "policy_version",
        "samples",
        "denoiser_calls",
        "reward_queries",
        "reward/total/mean",
        "reward/total/std",
    }
    contract |= {"reward/shapes/mean", "reward/shapes/std", "ratio/max_deviation", "ratio/clip_fraction", "grad_norm"}
    contract |= {"staleness/max", "restarts/rollout", "restarts/reward", "driver_bytes_per_sample"}
    contract |= {f"seconds/{p}" for p in ("rollout", "reward", "update", "sync", "round")}
    first = json.loads((local_run / "metrics.jsonl").read_text().splitlines()[0])
    assert contract <= first.keys()
    assert [m["samples"] for m in metrics(local_run)] == [8, 16, 24, 32]


def test_the_ratio_is_exactly_one_before_the_first_update(local_run: Path) -> None:
    assert [m["ratio/first_update"] for m in metrics(local_run)] == [0.0] * 4
    assert max(m["ratio/max_deviation"] for m in metrics(local_run)) > 0


def test_lanes_change_nothing(local_run: Path, tmp_path: Path) -> None:
    train_local(small_run("runtime.rollout_workers=3"), tmp_path / "run", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "run", local_run)


def test_extending_a_run_equals_a_long_one(local_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(small_run("rounds=2"), folder, resume=False, on_record=quiet)
    train_local(small_run(), folder, resume=True, on_record=quiet)
    assert_same_run(folder, local_run)


def test_staleness_is_a_schedule_that_resumes(tmp_path: Path) -> None:
    stale = ("runtime.max_staleness=1", "checkpoint.every=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_local(small_run(*stale), whole, resume=False, on_record=quiet)
    train_local(small_run(*stale, "rounds=2"), parts, resume=False, on_record=quiet)
    train_local(small_run(*stale), parts, resume=True, on_record=quiet)
    assert [m["staleness/max"] for m in metrics(whole)] == [0, 1, 0, 1]
    assert_same_run(parts, whole)


def test_the_histogram_of_staleness_and_the_proximal_form(tmp_path: Path) -> None:
    """With a proximal ratio the first update is on the ratio's 1, however old the samples are."""
    stale = ("runtime.max_staleness=2", "checkpoint.every=4", "algorithm.proximal=true")
    train_local(small_run(*stale), tmp_path / "run", resume=False, on_record=quiet)
    lines = metrics(tmp_path / "run")
    assert [m["staleness/max"] for m in lines] == [0, 1, 2, 2]
    assert {k: v for k, v in lines[-1].items() if k.startswith("staleness/samples")} == {
        "staleness/samples_0_behind": 8,
        "staleness/samples_1_behind": 8,
        "staleness/samples_2_behind": 16,
    }
    assert [m["ratio/first_update"] for m in lines] == [0.0] * 4
    assert lines[0]["ratio/behaviour_deviation"] == 0.0
    assert lines[2]["ratio/behaviour_deviation"] > 0.0


@pytest.mark.parametrize(("staleness", "ends_after"), [(0, 1), (1, 2)])
def test_a_stop_leaves_a_run_that_ends_as_an_undisturbed_one(staleness: int, ends_after: int, tmp_path: Path) -> None:
    """Rounds that were ordered ahead are finished first: with staleness 1 up to the checkpoint after round 2."""
    settings, folder = (f"runtime.max_staleness={staleness}", "checkpoint.every=2"), tmp_path / "stopped"

    def stop(line: dict[str, Any]) -> None:
        if line.get("round") == 1:
            control.ask(folder, stop=True)

    train_local(small_run(*settings), folder, resume=False, on_record=stop)
    assert control.status_of(folder)["state"] == "stopped"
    assert [m["round"] for m in metrics(folder)] == list(range(1, ends_after + 1))
    assert not (folder / "evaluation.json").exists()
    train_local(small_run(*settings), folder, resume=True, on_record=quiet)
    assert control.status_of(folder)["state"] == "ended"
    train_local(small_run(*settings), tmp_path / "whole", resume=False, on_record=quiet)
    assert_same_run(folder, tmp_path / "whole")


def test_kill_dash_nine_then_resume(local_run: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(dump(small_run()))
    command = [sys.executable, "-m", "rlalign", "train"]
    process = subprocess.Popen([*command, str(config), "--local", "--out", str(folder)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    lines = folder / "metrics.jsonl"
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "evaluation.json").exists()
    done = subprocess.run([*command, "--resume", str(folder), "--local"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, local_run)


def test_a_damaged_checkpoint_is_refused_by_name(local_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(small_run("rounds=2"), folder, resume=False, on_record=quiet)
    blob = folder / "checkpoints" / "round-00002" / "state.safetensors"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    with pytest.raises(UserError, match="round-00002 is damaged.*checksum"):
        train_local(small_run(), folder, resume=True, on_record=quiet)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(small_run("rounds=2"), folder, resume=False, on_record=quiet)
    with pytest.raises(UserError, match="belongs to another run"):
        train_local(small_run("seed=1"), folder, resume=True, on_record=quiet)


def test_the_exported_policy_loads_in_plain_diffusers(local_run: Path) -> None:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(local_run / "policy", local_files_only=True)
    tensors = final_tensors(local_run)
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, tensors[f"policy/{name}"])


def test_lora_trains_the_adapter_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(
        small_run("rounds=2", "policy.lora_rank=2", "learner.ema_decay=0.5"), folder, resume=False, on_record=quiet
    )
    names = [n for n in final_tensors(folder) if n.startswith("policy/")]
    assert names and all("lora_" in n for n in names)
    assert (folder / "policy" / "pytorch_lora_weights.safetensors").is_file()
    assert [m["ratio/first_update"] for m in metrics(folder)] == [0.0] * 2


def test_the_writer_is_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with checkpoint.exclusive(folder), pytest.raises(UserError, match="is being written by process"):
        with checkpoint.exclusive(folder, patience_seconds=0.5):
            pass
