"""Checkpoints of a training in stages: the newest whole one, under the same settings or with more
of what may grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.fitting.checkpoints import StageCheckpoints

SETTINGS = {"seed": 0, "second": {"updates": 10, "lr": 0.1}}


def of(folder: Path, settings: dict = SETTINGS) -> StageCheckpoints:
    return StageCheckpoints(folder, settings, every=2, grows="second.updates")


def test_the_newest_is_kept_whole_and_alone(tmp_path: Path) -> None:
    assert of(tmp_path).newest() == {}
    for stage, done in (("first", 2), ("first", 10), ("second", 2)):
        of(tmp_path).save(stage, done, {"done": torch.tensor(done)})
    (tmp_path / "second-00000004.tmp").mkdir()  # a crash while it was written
    assert of(tmp_path).newest() == {"done": torch.tensor(2)}
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".tmp"] == ["second-00000002"]
    assert of(tmp_path).clear() == {} == of(tmp_path).newest()


def test_other_settings_are_refused_but_more_updates_are_not(tmp_path: Path) -> None:
    of(tmp_path).save("first", 2, {"done": torch.tensor(2)})
    assert of(tmp_path, {"seed": 0, "second": {"updates": 11, "lr": 0.1}}).newest()
    with pytest.raises(UserError, match=r"second\.updates must stay 10 to resume from .*, got 9"):
        of(tmp_path, {"seed": 0, "second": {"updates": 9, "lr": 0.1}}).newest()
    with pytest.raises(
        UserError,
        match=r"second\.lr must stay 0\.1 to resume from .*, got 0\.2; choose another out",
    ):
        of(tmp_path, {"seed": 0, "second": {"updates": 10, "lr": 0.2}}).newest()
