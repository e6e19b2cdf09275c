"""The loop in one process: what it writes, that it repeats, and that it resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.alignment import control
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.alignment.loop import align, train_local
from rlalign.cli import main
from rlalign.config import Run, dump, load_run
from rlalign.core.records import Unit, Weights
from rlalign.core.registry import UserError
from rlalign.learning import checkpoint
from tests.runs import assert_same_run, final_tensors, metrics, points_run, quiet, small_run

pytestmark = pytest.mark.usefixtures("without_report")
Make = Callable[..., Run]


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
    assert sorted(p.name for p in (local_run / "checkpoints").iterdir()) == [
        "round-00002",
        "round-00004",
    ]
    assert {p.name for p in (local_run / "samples").glob("round-*.png")} >= {
        "round-00000.png",
        "round-00004.png",
    }
    reward = load_run(local_run / "config.yaml").rewards[0].title
    contract = {
        "round",
        "policy_version",
        "samples",
        "denoiser_calls",
        "reward_queries",
        "reward/total/mean",
        "reward/total/std",
    }
    contract |= {
        f"reward/{reward}/mean",
        f"reward/{reward}/std",
        "ratio/max_deviation",
        "ratio/clip_fraction",
        "grad_norm",
    }
    contract |= {"staleness/max", "restarts/rollout", "restarts/reward", "driver_bytes_per_sample"}
    contract |= {f"seconds/{p}" for p in ("rollout", "reward", "update", "sync", "round")}
    first = json.loads((local_run / "metrics.jsonl").read_text().splitlines()[0])
    assert contract <= first.keys()
    # of the one reward, all but what the engine does around it
    assert 0.0 < first[f"seconds/reward/{reward}"] <= first["seconds/reward"]
    assert [m["samples"] for m in metrics(local_run)] == [8, 16, 24, 32]


def test_the_ratio_is_exactly_one_before_the_first_update(local_run: Path) -> None:
    assert [m["ratio/first_update"] for m in metrics(local_run)] == [0.0] * 4
    assert max(m["ratio/max_deviation"] for m in metrics(local_run)) > 0


def test_what_is_at_work_is_told(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every unit and every update of the first round, where nothing is left out: four units of a
    prompt, two updates, and the evaluation's units before them."""
    monkeypatch.setattr("rlalign.alignment._rounds.TELL_SECONDS", 0.0)
    told: list[tuple[Any, ...]] = []

    def on_record(line: dict[str, Any]) -> None:
        if facts := line.get("progress"):
            assert facts["seconds"] >= 0
            told.append((facts["round"], facts["what"], facts["done"], facts["of"]))

    train_local(small("rounds=1"), tmp_path / "run", resume=False, on_record=on_record)
    units = [(1, "units", done, 4) for done in (1, 2, 3, 4)]
    updates = [(1, "updates", done, 2) for done in (1, 2)]
    first = told.index(units[0])
    assert told[first : first + 6] == units + updates
    assert told[:first] and {what[:2] for what in told[:first]} == {(0, "units")}
    assert told[first - 1][2] == told[first - 1][3], "all of the evaluation's"


def test_lanes_change_nothing(small: Make, local_run: Path, tmp_path: Path) -> None:
    train_local(small("runtime.rollout.workers=3"), tmp_path / "run", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "run", local_run)


def test_extending_a_run_equals_a_long_one(small: Make, local_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(small("rounds=2"), folder, resume=False, on_record=quiet)
    train_local(small(), folder, resume=True, on_record=quiet)
    assert_same_run(folder, local_run)


def test_settings_that_change_no_number_may_change_on_resume(
    small: Make, local_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train_local(small("rounds=1"), folder, resume=False, on_record=quiet)
    more = [
        "runtime.rollout.workers=3",
        "runtime.reward.workers=2",
        "runtime.unit_timeout_seconds=30",
        "evaluate.grid=2",
    ]
    more += [
        "checkpoint.every=3",
        "checkpoint.keep=1",
        "evaluate.every=4",
        "write_pairs=all",
        "name=elsewhere",
        "rounds=4",
    ]
    assert main(["train", "--resume", str(folder), *more, "--local"]) == 0
    assert metrics(folder) == metrics(local_run)
    mine, theirs = final_tensors(folder), final_tensors(local_run)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    shared = [line for line in metrics(local_run, "evaluations.jsonl") if line["round"] in (0, 4)]
    assert [line for line in metrics(folder, "evaluations.jsonl") if line["round"] != 1] == shared
    assert load_run(folder / "config.yaml") == small(*more), (
        "the folder says what the run went on with"
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round-00004"]
    assert len(list((folder / "preferences").iterdir())) == 3


def test_staleness_is_a_schedule_that_resumes(small: Make, tmp_path: Path) -> None:
    stale = ("runtime.max_staleness=1", "checkpoint.every=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_local(small(*stale), whole, resume=False, on_record=quiet)
    train_local(small(*stale, "rounds=2"), parts, resume=False, on_record=quiet)
    train_local(small(*stale), parts, resume=True, on_record=quiet)
    assert [m["staleness/max"] for m in metrics(whole)] == [0, 1, 0, 1]
    assert_same_run(parts, whole)


def test_the_histogram_of_staleness_and_the_proximal_form(small: Make, tmp_path: Path) -> None:
    """With a proximal ratio the first update is on the ratio's 1, however old the samples are."""
    stale = ("runtime.max_staleness=2", "checkpoint.every=4", "algorithm.proximal=true")
    train_local(small(*stale), tmp_path / "run", resume=False, on_record=quiet)
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
def test_a_stop_leaves_a_run_that_ends_as_an_undisturbed_one(
    small: Make, staleness: int, ends_after: int, tmp_path: Path
) -> None:
    """Rounds that were ordered ahead are finished first: with staleness 1 up to the checkpoint
    after round 2."""
    settings, folder = (
        (f"runtime.max_staleness={staleness}", "checkpoint.every=2"),
        tmp_path / "stopped",
    )

    def stop(line: dict[str, Any]) -> None:
        if line.get("round") == 1:
            control.ask(folder, stop=True)

    train_local(small(*settings), folder, resume=False, on_record=stop)
    assert control.status_of(folder)["state"] == "stopped"
    assert [m["round"] for m in metrics(folder)] == list(range(1, ends_after + 1))
    assert not (folder / "evaluation.json").exists()
    train_local(small(*settings), folder, resume=True, on_record=quiet)
    assert control.status_of(folder)["state"] == "ended"
    whole = tmp_path / "whole"
    train_local(small(*settings), whole, resume=False, on_record=quiet)
    assert_same_run(folder, whole)
    # the resumed run draws the base's pictures once more, the whole one keeps their scores
    found = [(one / "evaluation.json").read_bytes() for one in (folder, whole)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("staleness", "leaves_after"), [(0, 1), (1, 2)])
def test_a_learner_whose_machine_is_taken_away_goes_on_elsewhere(
    staleness: int, leaves_after: int, tmp_path: Path
) -> None:
    """It is told from the first round on; with rounds ordered ahead it leaves at the checkpoint."""

    class Leaving(LocalCollect):
        def leaves(self) -> bool:
            return True

    run = points_run(f"runtime.max_staleness={staleness}", "checkpoint.every=2")
    here, whole = tmp_path / "here", tmp_path / "whole"
    here.mkdir()
    assert align(run, here, Leaving(run), build_learner(run), quiet)
    assert [m["round"] for m in metrics(here)] == list(range(1, leaves_after + 1))
    assert not (here / "evaluation.json").exists()
    assert not align(run, here, LocalCollect(run), build_learner(run), quiet)
    train_local(run, whole, resume=False, on_record=quiet)
    assert_same_run(here, whole)


def test_no_evaluation_is_drawn_twice(small: Make, tmp_path: Path) -> None:
    """Three evaluations in four rounds: the comparison at the end draws none of its own."""
    drawn: list[tuple[str, int]] = []

    class Counting(LocalCollect):
        def order(
            self, units: Sequence[Unit], weights: Weights, reward: Weights | None = None
        ) -> int:
            drawn.extend([weights.tag] * (units[0].key.stream == "evaluate"))
            return super().order(units, weights, reward)

    run = small()
    (tmp_path / "run").mkdir()
    align(run, tmp_path / "run", Counting(run), build_learner(run), quiet)
    assert [kind for kind, _ in drawn] == ["base", "current", "current"]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["round"] == 4


DEADLY = """
import os, signal
from pathlib import Path

def score(media, prompts, folder='', mark=''):
    if mark and Path(folder, 'metrics.jsonl').read_text().count('\\n') == 3:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return [float(m.mean()) for m in media]
"""


@pytest.mark.promise
def test_kill_dash_nine_then_resume(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its fourth round, by a reward that knows where it is; the last checkpoint is of the
    second."""
    folder, mark, config = tmp_path / "run", tmp_path / "mark", tmp_path / "run.yaml"
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )

    def rewarded(arguments: str) -> Run:
        reward = f"{{name: function, call: 'deadly:score', arguments: {arguments}, label: mean}}"
        return small(f"rewards=[{reward}, {{name: jpeg, weight: 0.5}}]")

    train_local(rewarded("{}"), tmp_path / "whole", resume=False, on_record=quiet)
    config.write_text(dump(rewarded(f"{{folder: {folder}, mark: {mark}}}")))
    command = [sys.executable, "-m", "rlalign", "train"]
    killed = subprocess.run(
        [*command, str(config), "--local", "--out", str(folder)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert mark.exists()
    assert [m["round"] for m in metrics(folder)] == [1, 2, 3]
    assert not (folder / "evaluation.json").exists()
    assert main(["train", "--resume", str(folder), "--local"]) == 0
    assert_same_run(folder, tmp_path / "whole")


def test_a_damaged_checkpoint_is_refused_by_name(
    small: Make, local_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train_local(small("rounds=2"), folder, resume=False, on_record=quiet)
    blob = folder / "checkpoints" / "round-00002" / "state.safetensors"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    with pytest.raises(UserError, match="round-00002 is damaged.*checksum"):
        train_local(small(), folder, resume=True, on_record=quiet)


def test_another_runs_checkpoint_is_refused(small: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_local(small("rounds=2"), folder, resume=False, on_record=quiet)
    with pytest.raises(UserError, match="belongs to another run"):
        train_local(small("seed=1"), folder, resume=True, on_record=quiet)


@pytest.mark.promise
def test_the_exported_policy_loads_in_plain_diffusers(pipeline: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = tmp_path / "run"
    train_local(small_run("rounds=1", pipeline), folder, resume=False, on_record=quiet)
    exported = DiffusionPipeline.from_pretrained(folder / "policy", local_files_only=True)
    tensors = final_tensors(folder)
    for name, parameter in exported.unet.named_parameters():
        assert torch.equal(parameter, tensors[f"policy/{name}"])


@pytest.mark.promise
def test_lora_trains_the_adapter_alone(pipeline: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("rounds=2", pipeline, "policy.lora_rank=2", "learner.ema_decay=0.5")
    train_local(small_run(*settings), folder, resume=False, on_record=quiet)
    names = [n for n in final_tensors(folder) if n.startswith("policy/")]
    assert names and all("lora_" in n for n in names)
    assert (folder / "policy" / "pytorch_lora_weights.safetensors").is_file()
    assert [m["ratio/first_update"] for m in metrics(folder)] == [0.0] * 2


def test_the_writer_is_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        checkpoint.exclusive(folder),
        pytest.raises(UserError, match="is being written by process"),
    ):
        with checkpoint.exclusive(folder, patience_seconds=0.5):
            pass
