"""What a person sees while a run goes on, and that neither a page nor a sink ends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.config import Run, parse_run
from rlalign.core.pictures import read_grid
from rlalign.sinks.base import Sink
from tests.runs import final_tensors, metrics, quiet, two_rounds_of_points


class Broken(Sink):
    """A sink that is down. Source: a test's own."""

    def connect(self, origin):
        raise ConnectionError("nobody answers")


def points(**settings: Any) -> Run:
    """Two rounds of points in the plane, evaluated after each."""
    given: dict[str, Any] = {
        "rewards": [{"name": "centroid", "x": 0.2, "y": 0.2}],
        "algorithm": {"name": "ddpo", "clip_range": 0.1, "advantage": "group"},
        "learner": {"lr": 3e-3},
        "evaluate": {"every": 1, "prompts": 12, "grid": 4},
        "log": [],
    }
    return parse_run(two_rounds_of_points(samples_per_prompt=8, **given | settings))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlalign.report.write_report", lambda folder: None)
        train_local(points(), folder, resume=False, on_record=quiet)
    return folder


def test_every_evaluation_has_its_pictures_and_a_page(tmp_path, monkeypatch):
    """The page is there with each evaluation's line, of the rounds so far; the pictures before
    it."""
    pages = []

    def write_report(folder: Path) -> None:
        evaluations = (folder / "evaluations.jsonl").read_text().splitlines()
        pictures = sorted(path.name for path in (folder / "samples").glob("*.png"))
        pages.append((len(evaluations), (folder / "evaluation.json").is_file(), pictures))

    monkeypatch.setattr("rlalign.report.write_report", write_report)
    train_local(points(), tmp_path / "run", resume=False, on_record=quiet)
    first = ["base.png", "round-00000.png"]
    second = ["base.png", "round-00000.png", "round-00001-changes.png", "round-00001.png"]
    third = sorted([*second, "round-00002-changes.png", "round-00002.png"])
    assert pages == [
        (1, False, first),
        (2, False, second),
        (3, False, third),
        (3, True, third),
    ]
    assert len(read_grid(tmp_path / "run" / "samples" / "base.png")) == 12
    assert len(read_grid(tmp_path / "run" / "samples" / "round-00001.png")) == 4


def test_a_page_that_fails_on_the_way_ends_nothing(plain, tmp_path, monkeypatch):
    calls = []

    def write_report(folder: Path) -> None:
        calls.append(folder)
        if len(calls) < 3:
            raise RuntimeError("no font")

    monkeypatch.setattr("rlalign.report.write_report", write_report)
    told: list[dict[str, Any]] = []
    train_local(points(), tmp_path / "run", resume=False, on_record=told.append)
    notes = [line["note"] for line in told if "note" in line]
    assert (
        notes
        == [
            "the report is not renewed (RuntimeError: no font); the run goes on",
        ]
        * 2
    )
    assert len(calls) == 4
    assert_same(tmp_path / "run", plain)


@pytest.mark.usefixtures("without_report")
def test_a_sink_that_is_down_changes_no_number(plain, tmp_path):
    broken = {"name": f"{Broken.__module__}:Broken"}
    told: list[dict[str, Any]] = []
    run = points(log=[broken, {"name": "tensorboard"}])
    train_local(run, tmp_path / "run", resume=False, on_record=told.append)
    notes = [line["note"] for line in told if "note" in line]
    assert notes[0] == (
        f"log: {broken['name']} failed (ConnectionError: nobody answers); the run goes on, and"
        " metrics.jsonl has every number"
    )
    assert notes[1:] == [f"log: {broken['name']} failed 3 times in a row and is left out"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert_same(tmp_path / "run", plain)


class Kept(Sink):
    """A sink that writes down what it is told of the run. Source: a test's own."""

    def connect(self, origin):
        (origin.folder / "told.json").write_text(json.dumps(origin.settings))
        return self

    def write(self, round, values): ...

    def show(self, round, picture): ...

    def keep(self, file):
        with (file.parent / "kept.txt").open("a", encoding="utf-8") as handle:
            handle.write(f"{file.name}\n")

    def close(self, ended): ...


@pytest.mark.usefixtures("without_report")
def test_a_sink_is_told_of_no_secret(tmp_path, monkeypatch):
    """A word of the run file that happens to be a key of the environment is one."""
    sink = {"name": f"{Kept.__module__}:Kept"}
    train_local(points(log=[sink]), tmp_path / "open", resume=False, on_record=quiet)
    assert (tmp_path / "open" / "kept.txt").read_text().split() == ["config.yaml"]
    told = json.loads((tmp_path / "open" / "told.json").read_text())
    assert told == json.loads(points(log=[sink]).model_dump_json())

    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    secret = points(log=[sink], name="hush-hush")
    train_local(secret, tmp_path / "secret", resume=False, on_record=quiet)
    assert "hush" not in (tmp_path / "secret" / "told.json").read_text()
    assert not (tmp_path / "secret" / "kept.txt").exists()


@pytest.mark.usefixtures("without_report")
def test_sinks_may_change_where_a_run_goes_on(plain, tmp_path):
    folder = tmp_path / "run"
    train_local(points(rounds=1), folder, resume=False, on_record=quiet)
    train_local(points(log=[{"name": "tensorboard"}]), folder, resume=True, on_record=quiet)
    assert_same(folder, plain)


@pytest.mark.usefixtures("without_report")
def test_a_run_of_several_rewards_says_how_they_stand_to_each_other(tmp_path):
    rewards = [
        {"name": "centroid", "label": "near", "x": 0.2},
        {"name": "centroid", "label": "far", "x": -0.9, "at_least": -2.0, "weight": 0.0},
    ]
    run = points(rewards=rewards, combine="normalised")
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    for line in metrics(tmp_path / "run"):
        assert line["reward/total/mean"] == pytest.approx(line["reward/near/mean"])
        assert -1 <= line["reward/near/correlation/far"] <= 1
        assert 0 <= line["constraint/far/below"] <= 16
        assert line["reward/near/flat_groups"] == 0.0
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert final["gain"].keys() >= {"reward/near/mean", "reward/far/mean"}


def assert_same(folder: Path, other: Path) -> None:
    """Equal weights, bit for bit."""
    mine, theirs = final_tensors(folder), final_tensors(other)
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


# the guard in a run


DPOK = {"name": "dpok", "clip_range": 0.1, "kl_weight": 0.01}


@pytest.mark.usefixtures("without_report")
def test_a_guard_raises_the_kl_weight_and_a_resumed_run_keeps_it(tmp_path):
    """Whatever the KL is after a round, it is above so small a limit."""
    guard = {"limits": [{"name": "kl", "most": 1e-9}], "patience": 1, "action": "raise_kl"}
    told: list[dict[str, Any]] = []
    run = points(rounds=3, algorithm=DPOK, guard=guard)
    train_local(run, tmp_path / "whole", resume=False, on_record=told.append)
    notes = [line["note"] for line in told if "note" in line]
    assert [note.rpartition("; ")[2] for note in notes] == [
        f"the KL weight is now {factor} times its setting" for factor in (2, 4, 8)
    ]

    parts = tmp_path / "parts"
    train_local(points(rounds=2, algorithm=DPOK, guard=guard), parts, resume=False, on_record=quiet)
    train_local(run, parts, resume=True, on_record=quiet)
    assert_same(parts, tmp_path / "whole")

    unguarded = tmp_path / "unguarded"
    train_local(points(rounds=3, algorithm=DPOK), unguarded, resume=False, on_record=quiet)
    mine, theirs = final_tensors(unguarded), final_tensors(tmp_path / "whole")
    assert any(bool((mine[name] != theirs[name]).any()) for name in mine), "the weight counts"


@pytest.mark.usefixtures("without_report")
def test_a_guard_stops_at_a_kl_and_says_so_at_the_end(tmp_path):
    run = points(rounds=9, guard={"limits": [{"name": "kl", "most": 1e-9}]})
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    final = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert final["round"] == 2
    assert final["stopped"].startswith("guard: after round 2 the KL to the pretrained model is ")
