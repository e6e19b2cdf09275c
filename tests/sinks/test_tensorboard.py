"""TensorBoard reads what a run logged: numbers, also after a kill, and pictures."""

from __future__ import annotations

import math

import numpy as np

from rlalign.core.pictures import write_grid
from rlalign.core.registry import build
from rlalign.learning.log import Log
from rlalign.learning.metrics import Recorder
from rlalign.sinks.base import Origin
from tests.learning.test_metrics import evaluation, record


def log_of(folder, resume_at: int) -> Log:
    origin = Origin(folder=folder, name="trial", settings={}, resume_at=resume_at)
    return Log([build("sinks", {"name": "tensorboard"})], origin)


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = log_of(tmp_path, -1)
    first = Recorder(tmp_path, -1, log)
    for r in (1, 2, 3):
        first.write(record(r))
    first.write(record(4, bad=math.nan))
    first.write_evaluation(evaluation(2))
    media = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 16, 16), dtype=np.uint8)
    write_grid(tmp_path / "round-00002.png", media, ["a", "b"], [0.0, 1.0])
    log.show(2, tmp_path / "round-00002.png")
    log.close(ended=False)
    log = log_of(tmp_path, 2)  # the run was killed and goes on from round 2
    Recorder(tmp_path, 2, log).write(record(3, grad_norm=9.0))
    log.close(ended=True)
    assert log.take_notes() == []

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    rewards = [(e.step, e.value) for e in board.Scalars("reward/total/mean")]
    assert rewards == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert board.Scalars("grad_norm")[-1].value == 9.0
    assert [(e.step, e.value) for e in board.Scalars("evaluation/reward/shapes/mean")] == [
        (2, 0.625)
    ]
    assert "bad" not in board.Tags()["scalars"]
    assert [e.step for e in board.Images("samples")] == [2]
