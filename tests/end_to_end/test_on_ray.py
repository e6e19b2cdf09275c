"""The same runs on real Ray actors: bitwise the local run, undisturbed, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment import control
from rlalign.alignment.loop import train_local
from rlalign.config import Run, dump
from rlalign.core.registry import UserError
from rlalign.learning import checkpoint
from rlalign.learning.folders import refuse_for_new_run
from rlalign.runtime import train_on_ray
from rlalign.runtime.training.collect import RunFailed
from tests.processes import first_of, process_of
from tests.proxies import name_proxy, proxy
from tests.runs import assert_same_run, metrics, points_run, quiet, small_run

pytestmark = pytest.mark.ray
Make = Callable[..., Run]


def kill(role: str, folder: Path) -> None:
    """SIGKILL for the first process of a role in the running cluster."""
    process = checkpoint.writer(folder) if role == "learner" else process_of(first_of(role))
    assert process is not None
    os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of the embedded model, in one process."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    train_local(small_run(), folder, resume=False, on_record=quiet)
    return folder


def fail_to_begin(train: Callable[..., None], home: Path) -> tuple[Path, str]:
    """The folder of a run whose reward raised in the first evaluation, and what was said of it."""
    home.mkdir()
    (home / "faulty.py").write_text(
        "def score(media, prompts):\n    raise KeyError('the lexicon has no such word')\n"
    )
    run = points_run(
        "rewards.0={name: function, call: 'faulty:score'}", "runtime.max_attempts=2", "seed=5"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(home))
        with pytest.raises((RunFailed, UserError, KeyError)) as caught:
            train(run, home / "run", resume=False, on_record=quiet)
    assert (home / "run" / "status.json").is_file()
    refuse_for_new_run(home / "run")
    return home / "run", str(caught.value)


@pytest.mark.promise
def test_two_workers_equal_the_local_loop(
    small: Make,
    local_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a folder where another run never began, and in a batch job's environment: a TMPDIR
    that is too long for sockets, and a proxy for http."""
    folder, _ = fail_to_begin(train_local, tmp_path / "never")
    job = tmp_path / "slurm_jobdir_of_a_long_name" / "tmp.t0016-node-0042.cluster.example"
    job.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(job))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    notes: list[str] = []
    with proxy() as between:
        name_proxy(monkeypatch, between.url, tmp_path)
        train_on_ray(
            small(), folder, resume=False, on_record=lambda r: notes.append(r.get("note", ""))
        )
        local = [
            where for _, where, _ in between.asked if "127.0.0.1" in where or "localhost" in where
        ]
        assert local == [], "Ray Train asks the dashboard how its controller is"
    assert any(f"TMPDIR {str(job)!r} is" in note and "Ray's files are in" in note for note in notes)
    assert any(note.startswith("Ray dashboard: http://127.0.0.1:") for note in notes)
    assert_same_run(folder, local_run)
    with pytest.raises(UserError, match="holds a run; go on with"):
        train_on_ray(small(), folder, resume=False, on_record=quiet)
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert 0 < json.loads(last)["driver_bytes_per_sample"] <= 1000


GATED = """
import time
from pathlib import Path

def score(media, prompts, folder=''):
    lines = Path(folder, 'metrics.jsonl') if folder else None
    done = lines.read_text().count('\\n') if lines and lines.exists() else 0
    while done and not Path(folder, '..', f'go-{done}').exists():
        time.sleep(0.02)
    return [float(m.mean()) for m in media]
"""


@pytest.mark.promise
def test_kills_of_each_kind_and_scaling_change_nothing(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each round the next one waits until the driver has killed and scaled, however busy the
    machine is."""
    folder = tmp_path / "run"
    (tmp_path / "gated.py").write_text(GATED)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    killed: list[str] = []
    pools: list[dict[str, Any]] = []

    def run(arguments: str) -> Run:
        reward = f"{{name: function, call: 'gated:score', arguments: {arguments}, label: gated}}"
        return small(f"rewards=[{reward}, {{name: jpeg, weight: 0.5}}]")

    def disturb(line: dict[str, Any]) -> None:
        round = line.get("round", 0)
        if round in (1, 3):
            control.ask(folder, rollout_workers={1: 3, 3: 1}[round], reward_workers={"gated": 2})
        # not the gated reward's: it answers nothing while it waits for this function
        targets = {1: ("rollout",), 2: ("reward-jpeg", "coordinator"), 3: ("learner",)}
        for target in targets.get(round, ()):
            if target not in killed:
                killed.append(target)
                kill(target, folder)
        if (folder / "status.json").is_file():
            pools.append(control.status_of(folder).get("pools", {}))
        (tmp_path / f"go-{round}").touch()

    train_local(run("{}"), tmp_path / "whole", resume=False, on_record=quiet)
    train_on_ray(run(f"{{folder: {folder}}}"), folder, resume=False, on_record=disturb)
    assert killed == ["rollout", "reward-jpeg", "coordinator", "learner"]
    assert_same_run(folder, tmp_path / "whole")
    status = control.status_of(folder)
    assert status["state"] == "ended"
    assert {p["rollout"]["wanted"] for p in pools if p} >= {3, 1}
    assert status["pools"]["reward gated"]["wanted"] == 2


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_equals_the_local_loop(tmp_path: Path) -> None:
    import torch

    policy = small_run("policy.lora_rank=2").policy.load("cpu")
    policy.set_weights({n: torch.full_like(t, 0.02) for n, t in policy.weights().items()})
    policy.save(tmp_path / "adapter")
    run = small_run(f"policy.adapter={tmp_path / 'adapter'}", "rounds=2")
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
def test_a_denoiser_that_is_not_finite_ends_the_run_in_one_message(tmp_path: Path) -> None:
    """Found where a checkpoint is loaded and tried out; the learner's rate is not blamed."""
    from tests.pipelines import LARGE, spoil
    from tests.toy import save_pipeline

    folder = spoil(save_pipeline(tmp_path / "pipeline"), "unet", "conv_out.weight", LARGE)
    run = small_run(f"policy={{name: stable_diffusion, path: {folder}}}", "rewards=[{name: jpeg}]")
    with pytest.raises(
        UserError, match=r"^policy\.path: cannot read .*: unet: gives numbers that are not finite"
    ):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)


@pytest.mark.slow
def test_kill_dash_nine_of_the_whole_run_then_resume(quickstart_run: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(dump(small_run()))
    command = [sys.executable, "-m", "rlalign", "train"]
    process = subprocess.Popen(
        [*command, str(config), "--out", str(folder)], stdout=subprocess.DEVNULL
    )
    lines = folder / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    elsewhere = ["runtime.rollout.workers=3", "runtime.reward.spares=1", "checkpoint.keep=3"]
    done = subprocess.run(
        [*command, "--resume", str(folder), *elsewhere], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, quickstart_run)


@pytest.mark.slow
def test_a_worker_that_dies_on_every_attempt_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\n\ndef score(media, prompts):\n    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    run = small_run("rewards.0={name: function, call: 'deadly:score'}", "runtime.max_attempts=2")
    with pytest.raises(RunFailed, match="failed on 2 attempts") as caught:
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
    assert "its process died at work" in str(caught.value)


@pytest.mark.slow
def test_a_rewards_own_error_is_shown(tmp_path: Path) -> None:
    """And the run never began: the folder is free for another one."""
    _, said = fail_to_begin(train_on_ray, tmp_path / "never")
    assert "the lexicon has no such word" in said


@pytest.mark.slow
@pytest.mark.parametrize("victims", [{}, {1: "coordinator", 3: "learner"}])
def test_two_learners_equal_one_killed_or_not(
    quickstart_run: Path, tmp_path: Path, victims: dict[int, str]
) -> None:
    folder, left = tmp_path / "run", dict(victims)

    def disturb(line: dict[str, Any]) -> None:
        if victim := left.pop(line.get("round", 0), None):
            process = (
                checkpoint.writer(folder) if victim == "learner" else process_of(first_of(victim))
            )
            assert process is not None
            os.kill(process, signal.SIGKILL)

    train_on_ray(small_run("runtime.learner.workers=2"), folder, resume=False, on_record=disturb)
    assert not left, f"never killed: {left}"
    assert_same_run(folder, quickstart_run)


DYING = """
import os
from rlalign.algorithms.ddpo import DDPO

class Dying(DDPO):
    \"\"\"DDPO in which one learner's process ends while others wait, once, or raises every time.

    Source: none.
    \"\"\"

    mark: str = ""
    victim: str = "0"

    def loss(self, batch, policy, scorer=None):
        if os.environ["RANK"] == self.victim:
            if not self.mark:
                raise ArithmeticError("there is no such number")
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), 9)
            except FileExistsError:
                pass
        return super().loss(batch, policy, scorer)
"""


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An override that names a learner that dies, two of them at work."""
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "algorithm.name='dying:Dying'"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_learner_that_dies_while_another_waits_for_it_changes_nothing(
    quickstart_run: Path, tmp_path: Path, dying: str, victim: str
) -> None:
    """The other one's collective fails: that is the group's loss, and no error of the run."""
    mark = tmp_path / "mark"
    run = small_run(
        dying, f"algorithm.mark={mark}", f"algorithm.victim='{victim}'", "runtime.learner.workers=2"
    )
    train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
    assert mark.exists()
    assert_same_run(tmp_path / "run", quickstart_run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_an_error_in_one_of_two_learners_ends_the_run(
    tmp_path: Path, dying: str, victim: str
) -> None:
    run = small_run(dying, f"algorithm.victim='{victim}'", "runtime.learner.workers=2")
    with pytest.raises(RunFailed, match="there is no such number"):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)


@pytest.mark.slow
def test_staleness_on_ray_equals_local(tmp_path: Path) -> None:

    run = small_run("runtime.max_staleness=1")
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert max(m["staleness/max"] for m in metrics(tmp_path / "ray")) == 1
    assert_same_run(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["normalised", "product"])
def test_several_rewards_on_ray_equal_local(combine: str, tmp_path: Path) -> None:
    """Each with a constraint that some samples break."""
    first = "{name: jpeg, direction: incompressible, label: big}"
    second = "{name: jpeg, direction: incompressible, quality: 30, at_least: 0.6495}"
    run = points_run(f"combine={combine}", f"rewards=[{first}, {second}]")
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "ray", tmp_path / "local")
    below = [line["constraint/jpeg/below"] for line in metrics(tmp_path / "local")]
    assert 0 < sum(below) < 32


@pytest.mark.slow
def test_a_reward_that_hangs_is_replaced_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call ever sleeps for an hour; its worker is killed after the unit's time and the
    unit asked again."""
    (tmp_path / "sleepy.py").write_text(
        "import os, time\n"
        "def score(media, prompts, mark=''):\n"
        "    if mark:\n"
        "        try:\n"
        "            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "            time.sleep(3600)\n"
        "        except FileExistsError:\n"
        "            pass\n"
        "    return [float(m.mean()) for m in media]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(mark: str) -> Any:
        arguments = f"{{mark: '{mark}'}}"
        reward = (
            f"rewards=[{{name: function, call: 'sleepy:score', arguments: {arguments}, label:"
            " sleepy}]"
        )
        # a busy machine may take a worker for one that hangs: that may happen often
        limits = ("runtime.unit_timeout_seconds=20", "runtime.max_attempts=100")
        return small_run(reward, "rounds=2", *limits)

    train_on_ray(run(str(tmp_path / "mark")), tmp_path / "hung", resume=False, on_record=quiet)
    assert (tmp_path / "mark").exists()

    train_local(run(""), tmp_path / "awake", resume=False, on_record=quiet)
    assert metrics(tmp_path / "hung") == metrics(tmp_path / "awake")


@pytest.mark.slow
def test_a_reward_that_always_hangs_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asleep.py").write_text(
        "import time\ndef score(media, prompts):\n    time.sleep(3600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = "rewards=[{name: function, call: 'asleep:score'}]"
    run = small_run(reward, "runtime.unit_timeout_seconds=8", "runtime.max_attempts=2")
    with pytest.raises(RunFailed, match=r"failed on 2 attempts .*\n.*no answer in 8 s"):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
