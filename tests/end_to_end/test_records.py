"""A run whose prompts carry records: rewards read them, and what a run leaves says them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rlalign.alignment.loop import train_local
from rlalign.config import Run
from rlalign.core.prompts import record_of
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.learning import checkpoint
from tests.runs import assert_same_run, metrics, points_run, quiet

ROWS = [
    {"prompt": "left", "tag": "counting", "metadata": {"factor": 1.0}},
    {"prompt": "right", "tag": "counting", "metadata": {"factor": -2.0}},
    {"prompt": "up", "tag": "a/b", "metadata": {"factor": 0.5}},
    {"prompt": "left", "tag": "colours", "metadata": {"factor": 3.0}},
]


def by_record(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Each picture's red times its record's factor; without a record it fails."""
    factor_B = torch.tensor([record_of(prompt)["factor"] for prompt in prompts])
    return media_BFCHW[:, :, 0].mean((1, 2, 3)) * factor_B


def run_of(folder: Path, *overrides: str) -> Run:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held = folder / "test.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    return points_run(
        f"prompts={{name: file, path: {path}, held_out_path: {held}, per_round: 4, per_unit: 1,"
        " samples_per_prompt: 2}",
        "rewards=[{name: function, call: 'tests.end_to_end.test_records:by_record', label: read}]",
        "evaluate.by=tag",
        "evaluate.prompts=3",
        "rounds=1",
        "write_pairs=all",
        "runtime.rollout.workers=1",
        *overrides,
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run in this process, and the notes of its course."""
    home = tmp_path_factory.mktemp("records")
    notes: list[str] = []

    def listen(line: dict) -> None:
        notes.extend([line["note"]] if "note" in line else [])

    train_local(run_of(home), home / "run", resume=False, on_record=listen)
    return home, notes


def test_prompts_on_both_sides_are_told_at_the_start(local: tuple[Path, list[str]]) -> None:
    assert local[1] == ["prompts: 3 of 3 held-out prompts are trained on as well, such as 'left'"]


def test_check_tells_them_too(tmp_path: Path) -> None:
    from rlalign.cli.check.describe import read_prompts_and_pairs

    said = read_prompts_and_pairs(run_of(tmp_path))
    assert said["held-out prompts"].startswith("3 of 3 held-out prompts are trained on as well")


def test_scores_are_told_by_a_field_of_the_record(local: tuple[Path, list[str]]) -> None:
    folder = local[0] / "run"
    final = json.loads((folder / "evaluation.json").read_text())
    samples = final["samples"]
    assert [s["record"]["tag"] for s in samples] == ["counting", "a/b", "colours"]
    after = final["aligned"]
    for sample, value in zip(samples, ("counting", "a|b", "colours"), strict=True):
        assert after[f"reward/read/tag={value}"] == pytest.approx(sample["aligned"]["read"])
    assert after["reward/read/mean_by_tag"] == pytest.approx(after["reward/read/mean"])
    assert "reward/read/tag=counting" in final["gain"]
    for line in metrics(folder, "evaluations.jsonl"):
        assert "reward/total/tag=colours" in line
    report = (folder / "report.html").read_text()
    assert "tag = counting" in report
    assert "mean over tag" in report


def test_pairs_keep_their_captions_records(local: tuple[Path, list[str]]) -> None:
    """Two prompts of one text and of two records are two groups."""
    files = sorted((local[0] / "run" / "preferences").glob("*.parquet"))
    table = pq.read_table(files[0])
    rows = table.select(["caption", "record", "ranking_id"]).to_pylist()
    assert len(rows) == len({row["ranking_id"] for row in rows}) == 4
    expected = sorted((row["prompt"], row["tag"], row["metadata"]["factor"]) for row in ROWS)
    found = [(row["caption"], json.loads(row["record"])) for row in rows]
    assert sorted((c, r["tag"], r["factor"]) for c, r in found) == expected
    reader = PairReader(PreferenceSettings(path=str(files[0]), pairs_per_round=16, ties="half"), 0)
    again = [(pair.caption, record_of(pair.caption)) for pair in reader.all()]
    assert sorted((str(c), r["tag"], r["factor"]) for c, r in again) == expected


@pytest.mark.promise
def test_a_resumed_run_replays_prompts_with_their_records(tmp_path: Path) -> None:
    """One round and another are two, bit for bit, and what is remembered has its records."""
    more = [
        "algorithm={name: dpok, replay: 1}",
        "checkpoint.every=1",
        "evaluate.every=1",
        "write_pairs=''",
    ]
    states = []
    for name, rounds in (("whole", (2,)), ("parts", (1, 2))):
        folder = tmp_path / name
        for count in rounds:
            run = run_of(tmp_path, *more, f"rounds={count}")
            train_local(run, folder, resume=count != rounds[0], on_record=quiet)
        state = json.loads((checkpoint.folder_of(folder, 2) / "state.json").read_text())
        states.append(state["facts"]["memory"])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert states[0] == states[1]
    factors = [[r["factor"] for r in unit["records"]] for unit in states[1]["earlier"][0]]
    assert sorted(factors) == [[-2.0, -2.0], [0.5, 0.5], [1.0, 1.0], [3.0, 3.0]]


@pytest.mark.slow
@pytest.mark.ray
def test_records_travel_on_ray(local: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The same run on Ray, bit for bit."""
    from rlalign.runtime import train_on_ray

    train_on_ray(run_of(tmp_path), tmp_path / "run", resume=False, on_record=quiet)
    assert_same_run(local[0] / "run", tmp_path / "run")
