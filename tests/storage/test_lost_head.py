"""What a lost head costs: a run whose folder is on a store goes on on another cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import dump, load_run
from tests.heads import Head, start_head
from tests.runs import assert_same_run, points_run, quiet
from tests.stores import Bucket, environment_of

SLOW = """
import time
from pathlib import Path

def score(media, prompts, folder):
    if not Path(folder, "fast").exists():
        time.sleep(0.2)
    return [float(m.mean()) for m in media]
"""
"""A reward that takes a second of a round, until a file is there."""


def slow_run(home: Path) -> str:
    """The run file of a thousand rounds, which nobody waits for."""
    home.mkdir()
    (home / "slow.py").write_text(SLOW)
    reward = f"{{name: function, call: 'slow:score', arguments: {{folder: {home}}}, label: slow}}"
    run = points_run("rounds=1000", f"rewards=[{reward}]")
    (home / "run.yaml").write_text(dump(run))
    return str(home / "run.yaml")


def lines(bucket: Bucket) -> list[int]:
    """The rounds that the store has a line of."""
    if "runs/lost/metrics.jsonl" not in bucket.list("runs/lost/metrics"):
        return []
    said = bucket.read("runs/lost/metrics.jsonl").decode()
    return [json.loads(line)["round"] for line in said.splitlines()]


def checkpoints(bucket: Bucket) -> list[int]:
    names = [key.split("/") for key in bucket.list("runs/lost/checkpoints/")]
    return sorted(int(one[-2][6:]) for one in names if one[-1] == "state.json")


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_head_costs_the_rounds_since_the_last_checkpoint(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``submit --resume`` on another fresh cluster, and the run is the undisturbed one."""
    home, url = tmp_path / "home", bucket.url("runs/lost")
    config = slow_run(home)
    around = {**environment_of(bucket.endpoint), "PYTHONPATH": path_with(home)}
    with start_head(tmp_path / "first", around) as first:
        done = first.rlalign("submit", config, "--out", url, "--id", "lost")
        assert done.returncode == 0, done.stderr
        assert f"run folder there: {url}" in done.stdout
        while not checkpoints(bucket):
            assert "failed" not in first.rlalign("status", "lost").stdout, logs(first, "lost")
            time.sleep(0.5)
        first.kill()
    seen, kept = max(lines(bucket)), max(checkpoints(bucket))
    (home / "fast").touch()

    with start_head(tmp_path / "second", around) as second:
        began = time.monotonic()
        more = (config, f"rounds={kept + 2}", "--id", "again")
        done = second.rlalign("submit", "--resume", url, *more)
        assert done.returncode == 0, done.stderr
        while "again: succeeded" not in (said := second.rlalign("status", "again").stdout):
            assert "failed" not in said, logs(second, "again")
            time.sleep(0.5)
        print(
            f"lost with {seen} rounds in the store and a checkpoint of round {kept}:"
            f" {seen - kept} of them done again; {time.monotonic() - began:.1f} s from the submit"
            " to the end of two rounds"
        )
    assert seen >= kept, "a checkpoint comes after the lines of its rounds"
    assert_undisturbed(bucket, config, kept + 2, tmp_path, monkeypatch)


def assert_undisturbed(
    bucket: Bucket, config: str, rounds: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has what one process would have made alone."""
    monkeypatch.syspath_prepend(str(Path(config).parent))
    run = load_run(config, [f"rounds={rounds}"])
    train_local(run, folder / "alone", resume=False, on_record=quiet)
    assert_same_run(bucket.copy_to("runs/lost", folder / "copied"), folder / "alone")


def path_with(home: Path) -> str:
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def logs(head: Head, job: str) -> str:
    return head.rlalign("logs", job).stdout


@pytest.mark.slow
def test_kill_dash_nine_then_resume(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, url = tmp_path / "home", bucket.url("runs/lost")
    config = slow_run(home)
    around = {**os.environ, **environment_of(bucket.endpoint), "PYTHONPATH": path_with(home)}
    command = [sys.executable, "-m", "rlalign", "train", "--local"]
    process = subprocess.Popen([*command, config, "--out", url], env=around)
    while not checkpoints(bucket):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = max(checkpoints(bucket))
    (home / "fast").touch()
    more = ["--resume", url, f"rounds={kept + 2}"]
    done = subprocess.run([*command, *more], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"report: {url}/report.html" in done.stdout
    assert_undisturbed(bucket, config, kept + 2, tmp_path, monkeypatch)
