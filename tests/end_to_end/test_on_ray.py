"""The same runs on real Ray actors: bitwise the local run, undisturbed, killed and resumed."""

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
from rlalign.registry import UserError
from rlalign.runtime import train_on_ray
from rlalign.runtime.collect import RunFailed
from tests.runs import assert_same_run, metrics, small_run

pytestmark = pytest.mark.ray


def quiet(_: object) -> None:
    """No screen."""


def process_of(role: str) -> int:
    """The process of the first actor of a role in the running cluster."""
    import ray

    names = [n for n in ray.util.list_named_actors() if f"/{role}" in n]
    return ray.get(ray.get_actor(sorted(names)[0]).process_id.remote(), timeout=60)


def test_two_workers_equal_the_local_loop(local_run: Path, tmp_path: Path) -> None:
    train_on_ray(small_run(), tmp_path / "run", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "run", local_run)
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert 0 < json.loads(last)["driver_bytes_per_sample"] <= 1000


def test_kills_of_each_kind_and_scaling_change_nothing(local_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed: list[str] = []
    pools: list[dict[str, Any]] = []

    def disturb(line: dict[str, Any]) -> None:
        round = line.get("round", 0)
        if round in (1, 3):
            control.ask(folder, rollout_workers={1: 3, 3: 1}[round], reward_workers={"shapes": 2})
        for target in {1: ("rollout",), 2: ("reward", "coordinator"), 3: ("learner",)}.get(round, ()):
            if target not in killed:
                killed.append(target)
                process = checkpoint.writer(folder) if target == "learner" else process_of(target)
                assert process is not None
                os.kill(process, signal.SIGKILL)
        if (folder / "status.json").is_file():
            pools.append(control.status_of(folder).get("pools", {}))

    train_on_ray(small_run(), folder, resume=False, on_record=disturb)
    assert killed == ["rollout", "reward", "coordinator", "learner"]
    assert_same_run(folder, local_run)
    status = control.status_of(folder)
    assert status["state"] == "ended"
    assert {p["rollout"]["wanted"] for p in pools if p} >= {3, 1}
    assert status["pools"]["reward shapes"]["wanted"] == 2


@pytest.mark.slow
def test_kill_dash_nine_of_the_whole_run_then_resume(local_run: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(dump(small_run()))
    command = [sys.executable, "-m", "rlalign", "train"]
    process = subprocess.Popen([*command, str(config), "--out", str(folder)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    lines = folder / "metrics.jsonl"
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "--resume", str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, local_run)


@pytest.mark.slow
def test_a_worker_that_dies_on_every_attempt_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os\n\ndef score(media, prompts):\n    os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    run = small_run("rewards.0={name: function, call: 'deadly:score'}", "runtime.max_attempts=2")
    with pytest.raises(RunFailed, match="failed on 2 attempts") as caught:
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
    assert "its process died at work" in str(caught.value)


def test_a_rewards_own_error_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(
        "def score(media, prompts):\n    raise KeyError('the lexicon has no such word')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    run = small_run("rewards.0={name: function, call: 'faulty:score'}", "runtime.max_attempts=2")
    with pytest.raises((RunFailed, UserError), match="the lexicon has no such word"):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [{}, {1: "coordinator", 3: "learner"}])
def test_two_learners_equal_one_killed_or_not(local_run: Path, tmp_path: Path, victims: dict[int, str]) -> None:
    folder, left = tmp_path / "run", dict(victims)

    def disturb(line: dict[str, Any]) -> None:
        if victim := left.pop(line.get("round", 0), None):
            process = checkpoint.writer(folder) if victim == "learner" else process_of(victim)
            assert process is not None
            os.kill(process, signal.SIGKILL)

    train_on_ray(small_run("runtime.learner_workers=2"), folder, resume=False, on_record=disturb)
    assert not left, f"never killed: {left}"
    assert_same_run(folder, local_run)


DYING = """
import os
from rlalign.algorithms.ddpo import DDPO

class Dying(DDPO):
    \"\"\"DDPO in which one learner's process ends while the others wait for its gradient, once, or raises every time.

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
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_learner_that_dies_while_another_waits_for_it_changes_nothing(
    local_run: Path, tmp_path: Path, dying: str, victim: str
) -> None:
    """The other one's collective fails: that is the group's loss, and no error of the run."""
    mark = tmp_path / "mark"
    run = small_run(dying, f"algorithm.mark={mark}", f"algorithm.victim='{victim}'", "runtime.learner_workers=2")
    train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
    assert mark.exists()
    assert_same_run(tmp_path / "run", local_run)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_an_error_in_one_of_two_learners_ends_the_run(tmp_path: Path, dying: str, victim: str) -> None:
    run = small_run(dying, f"algorithm.victim='{victim}'", "runtime.learner_workers=2")
    with pytest.raises(RunFailed, match="there is no such number"):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)


@pytest.mark.slow
def test_staleness_on_ray_equals_local(tmp_path: Path) -> None:
    from rlalign.loop import train_local

    run = small_run("runtime.max_staleness=1")
    train_local(run, tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert max(m["staleness/max"] for m in metrics(tmp_path / "ray")) == 1
    assert_same_run(tmp_path / "ray", tmp_path / "local")


@pytest.mark.slow
def test_a_reward_that_hangs_is_replaced_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call ever sleeps for an hour; its worker is killed after the unit's time and the unit asked again."""
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
        reward = f"rewards=[{{name: function, call: 'sleepy:score', arguments: {arguments}, label: sleepy}}]"
        return small_run(reward, "rounds=2", "runtime.unit_timeout_seconds=20")

    train_on_ray(run(str(tmp_path / "mark")), tmp_path / "hung", resume=False, on_record=quiet)
    assert (tmp_path / "mark").exists()
    from rlalign.loop import train_local

    train_local(run(""), tmp_path / "awake", resume=False, on_record=quiet)
    assert metrics(tmp_path / "hung") == metrics(tmp_path / "awake")


@pytest.mark.slow
def test_a_reward_that_always_hangs_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asleep.py").write_text("import time\ndef score(media, prompts):\n    time.sleep(3600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = "rewards=[{name: function, call: 'asleep:score'}]"
    run = small_run(reward, "runtime.unit_timeout_seconds=8", "runtime.max_attempts=2")
    with pytest.raises(RunFailed, match=r"failed on 2 attempts .*\n.*no answer in 8 s"):
        train_on_ray(run, tmp_path / "run", resume=False, on_record=quiet)
