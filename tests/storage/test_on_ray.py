"""A run on Ray whose folder is on a store: driver and learner each have a folder of their own, and
the learner's next one has what the first had published."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from rlalign.alignment.loop import train_local
from rlalign.learning import checkpoint
from rlalign.runtime import train_on_ray
from tests.runs import assert_same_run, points_run, quiet
from tests.stores import Bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GATED = """
import time
from pathlib import Path

calls = []

def score(media, prompts, gate):
    calls.append(1)
    while len(calls) > 16 and not Path(gate).exists():
        time.sleep(0.02)
    return [float(m.mean()) for m in media]
"""
"""A reward that waits for a file once more is asked than two rounds and two evaluations ask."""


def test_a_killed_learner_goes_on_from_the_store(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    gate = tmp_path / "gate"
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def kill_learner() -> None:
        """When the store has the checkpoint of round 2."""
        while "run/checkpoints/round-00002/state.json" not in bucket.list("run/"):
            time.sleep(0.1)
        writers = [checkpoint.writer(one) for one in tmp_path.glob("rlalign-*/*")]
        os.kill(next(one for one in writers if one not in (None, os.getpid())), signal.SIGKILL)
        gate.touch()

    reward = f"{{name: function, call: 'gated:score', arguments: {{gate: {gate}}}, label: gated}}"
    run = points_run("rounds=12", f"rewards=[{reward}]")
    killer = threading.Thread(target=kill_learner, daemon=True)
    killer.start()
    train_on_ray(run, bucket.url("run"), resume=False, on_record=quiet)
    assert gate.exists()
    train_local(run, tmp_path / "alone", resume=False, on_record=quiet)
    assert_same_run(bucket.copy_to("run", tmp_path / "copied"), tmp_path / "alone")
    assert not [key for key in bucket.list("run/") if "/." in key]
