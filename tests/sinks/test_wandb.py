"""Weights & Biases, offline: its file holds the run; a key is nowhere; a server that is down ends
nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlalign.core.clips import read_clip
from tests.sinks.logged import files_with, log_rounds

pytestmark = pytest.mark.promise
KEY = "0123456789abcdef" * 3
"""As long as keys are."""
OFFLINE = {"name": "wandb", "project": "trials", "mode": "offline"}


def records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format after seven bytes of W&B's."""
    from wandb.proto import wandb_internal_pb2

    (file,) = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[-1:]
    content = file.read_bytes()
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            record = b""
            yield found


def history(folder: Path) -> list[dict[str, str]]:
    """Name -> JSON of each line that was logged."""
    return [
        {item.key or item.nested_key[0]: item.value_json for item in one.history.item}
        for one in records(folder)
        if one.WhichOneof("record_type") == "history"
    ]


def test_an_offline_run_holds_metrics_pictures_settings_and_the_report(tmp_path):
    folder = tmp_path / "run"
    first = log_rounds(folder, OFFLINE, WANDB_API_KEY=KEY)
    assert first.told == []
    lines = history(folder)
    numbers = [(x["round"], x["reward/total/mean"]) for x in lines if "reward/total/mean" in x]
    assert numbers == [("1", "0.25"), ("2", "0.5"), ("3", "0.75")]
    assert not any("missing" in line for line in lines)
    pictures = [name for line in lines for name in ("samples", "changes") if name in line]
    assert pictures == ["samples", "changes", "samples"]
    assert sum("samples_clips" in line for line in lines) == 1
    (gif,) = folder.rglob("samples_clips*.gif")
    assert read_clip(gif)[:, 0].max(axis=(1, 2)).tolist() == [250, 250, 250]  # the paper between
    assert read_clip(gif)[:, 0, 10, 10].tolist() == [0, 200, 200]
    kinds = list(records(folder))
    run = next(r.run for r in kinds if r.WhichOneof("record_type") == "run")
    settings = {item.key: item.value_json for item in run.config.update}
    assert settings["plan"] == '{"steps":10}'
    assert (run.project, run.display_name) == ("trials", "trial")
    kept = [r.artifact for r in kinds if r.WhichOneof("record_type") == "artifact"]
    names = [(one.name, [c.path for c in one.manifest.contents]) for one in kept]
    assert ("trial-report", ["report.html"]) in names
    assert ("trial-config", ["config.yaml"]) in names

    # the key is in no file, no line and no command
    assert files_with([KEY], folder, tmp_path / "home") == []
    assert KEY not in first.said
    assert not any(KEY in command for command in first.arguments)
    assert len(first.arguments) > 1, "its service was seen"

    # a run that goes on is the same one
    assert log_rounds(folder, OFFLINE, resume_at=2).told == []
    again = next(r.run for r in records(folder) if r.WhichOneof("record_type") == "run")
    assert again.run_id == run.run_id


def test_no_key_is_told_and_nobody_is_asked(tmp_path):
    told = log_rounds(tmp_path / "run", {"name": "wandb"}).told
    assert told[0] == (
        "log: wandb failed (there is no key; set WANDB_API_KEY, or give the command wandb login);"
        " the run goes on, and metrics.jsonl has every number"
    )


def test_a_server_that_is_down_ends_nothing(tmp_path):
    found = log_rounds(
        tmp_path / "run",
        {"name": "wandb"},
        WANDB_API_KEY=KEY,
        WANDB_BASE_URL="http://127.0.0.1:9",  # the port of discard, where nobody listens
        WANDB_INIT_TIMEOUT="2",
    )
    failed, left_out = found.told
    assert failed.startswith("log: wandb failed (")
    assert left_out == "log: wandb failed 3 times in a row and is left out"
    assert files_with([KEY], tmp_path) == []
    assert KEY not in found.said
    assert not any(KEY in command for command in found.arguments)
