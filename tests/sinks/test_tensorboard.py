"""TensorBoard reads what a run logged: numbers, also after a kill, and pictures."""

from __future__ import annotations

import math

import numpy as np

from rlalign.core.clips import decode_clip
from rlalign.core.pictures import GAP, write_grid
from rlalign.core.registry import build
from rlalign.learning.log import Log
from rlalign.learning.metrics import Recorder
from rlalign.sinks.base import Origin
from tests.learning.test_metrics import evaluation, record
from tests.made_clips import made_clips


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
    assert "samples_clips" not in board.Tags()["images"]


def test_clips_play_side_by_side_frame_by_frame(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    media = made_clips(6)
    log = log_of(tmp_path, -1)
    write_grid(tmp_path / "round-00004.png", media, list("abcdef"), [0.0] * 6, rate=12.0)
    log.show(4, tmp_path / "round-00004.png")
    log.close(ended=True)
    assert log.take_notes() == []
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Images("samples_clips")
    assert event.encoded_image_string.startswith(b"\x89PNG")
    sheet = decode_clip(event.encoded_image_string)
    assert (event.step, sheet.rate) == (4, 12.0)
    assert (event.height, event.width) == sheet.media_FCHW.shape[2:]
    # four in a row; sides of 16 and 24 are shown six times as large
    for number, clip in enumerate(media):
        y, x = GAP + number // 4 * (96 + GAP), GAP + number % 4 * (144 + GAP)
        tile = sheet.media_FCHW[:, :, y : y + 96, x : x + 144]
        assert np.array_equal(tile[:, :, ::6, ::6], clip)
        assert np.array_equal(tile, clip.repeat(6, axis=2).repeat(6, axis=3))
