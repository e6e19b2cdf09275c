"""What algorithms keep between rounds survives a stop: critic, replayed transitions, slow copy,
refreshed reference, guard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlalign.alignment.loop import train_local
from rlalign.cli.app import main
from rlalign.config import Run
from rlalign.core.registry import UserError
from tests.runs import assert_same_run, final_tensors, metrics, points_run, quiet, small_run

pytestmark = pytest.mark.usefixtures("without_report")
Make = Callable[..., Run]

KEEPERS = {
    "critic and replay": "{name: dpok, value_lr: 1.0e-3, replay: 1, clip_range: 1.0e-2}",
    "slow copy": "{name: diffusion_nft, decay_slope: 0.2, draws: 2}",
    "refreshed reference": "{name: diffusion_dpo, beta: 100.0, refresh_every: 1, draws: 2}",
}


@pytest.mark.promise
@pytest.mark.parametrize("algorithm", KEEPERS.values(), ids=list(KEEPERS))
def test_a_stopped_run_ends_as_an_undisturbed_one(
    small: Make, algorithm: str, tmp_path: Path
) -> None:
    settings = ("rounds=2", f"algorithm={algorithm}", "checkpoint.every=1", "evaluate.every=0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_local(small(*settings), whole, resume=False, on_record=quiet)
    train_local(small(*settings, "rounds=1"), parts, resume=False, on_record=quiet)
    train_local(small(*settings), parts, resume=True, on_record=quiet)
    mine, theirs = final_tensors(parts), final_tensors(whole)
    assert {n.split("/")[0] for n in mine} > {
        "policy",
        "optimiser",
        "version",
    }, "something is kept beside the policy"
    assert mine.keys() == theirs.keys()
    assert metrics(parts) == metrics(whole)
    assert all(bool((mine[n] == theirs[n]).all()) for n in mine)


def test_replay_learns_from_earlier_rounds_too(small: Make, tmp_path: Path) -> None:
    """The first update of round 2 sees round 1's transitions, whose ratio is no longer 1; rounds of
    no replay see 1."""
    for replay, expected in ((0, True), (1, False)):
        folder = tmp_path / str(replay)
        algorithm = f"algorithm={{name: dpok, replay: {replay}, clip_range: 1.0e-2}}"
        train_local(
            small("rounds=2", algorithm, "learner.updates_per_round=1"),
            folder,
            resume=False,
            on_record=quiet,
        )
        first = [m["ratio/first_update"] for m in metrics(folder)]
        assert first[0] == 0.0
        assert (first[1] == 0.0) is expected


def test_offline_preferences_from_a_runs_own_pairs(small: Make, tmp_path: Path) -> None:
    """Pairs that one run wrote train another, which asks neither rollout workers nor rewards for
    samples."""
    train_local(
        small("rounds=2", "write_pairs=all"), tmp_path / "source", resume=False, on_record=quiet
    )
    files = sorted((tmp_path / "source" / "preferences").glob("*.parquet"))
    assert [f.stem for f in files] == ["round-00001", "round-00002"]
    settings = (
        "algorithm={name: diffusion_dpo, beta: 500.0, draws: 2}",
        (
            f"preferences={{path: {files[0].parent}, pairs_per_round: 6, pairs_per_pass: 3,"
            " shuffle: 4}"
        ),
        "rounds=2",
        "checkpoint.every=1",
        "evaluate.every=1",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_local(small(*settings), whole, resume=False, on_record=quiet)
    lines = metrics(whole)
    assert [(m["samples"], m["reward_queries"]) for m in lines] == [(0, 0)] * 2
    assert all(0.0 <= m["preference/accuracy"] <= 1.0 for m in lines)
    train_local(small(*settings, "rounds=1"), parts, resume=False, on_record=quiet)
    train_local(small(*settings), parts, resume=True, on_record=quiet)
    assert_same_run(parts, whole)


def test_preferences_are_for_algorithms_that_learn_from_pairs() -> None:
    with pytest.raises(UserError, match="learn from pairs, and ddpo does not"):
        small_run("preferences={path: nowhere.parquet}")


WATCHED = {
    "points": (
        points_run,
        "rewards=[{name: centroid, x: 1, y: 1}]",
        "evaluate.rewards=[{name: centroid, x: -1, y: -1, label: away}]",
        "guard={limits: [{name: held_out, reward: away, drop: 0.02}]}",
    ),
    "quickstart": (
        small_run,
        "rewards=[{name: jpeg, direction: compressible}]",
        "evaluate.rewards=[{name: shapes}]",
        "guard={limits: [{name: held_out, reward: shapes, drop: 0.02}]}",
    ),
}


@pytest.mark.promise
@pytest.mark.parametrize("model", ["points", pytest.param("quickstart", marks=pytest.mark.slow)])
def test_the_guard_stops_an_over_optimising_run(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained away from what is watched (to another corner; to smaller files, where captions are
    verified): every fall counts, and the run ends before its last round."""
    folder = tmp_path / "run"
    make, *watched = WATCHED[model]
    settings = (
        *watched,
        "rounds=12",
        "evaluate.every=1",
        "evaluate.prompts=16",
        "learner.lr=1e-3",
    )
    notes: list[str] = []
    train_local(
        make(*settings),
        folder,
        resume=False,
        on_record=lambda line: notes.append(line.get("note", "")),
    )
    done = metrics(folder)[-1]["round"]
    assert done < 12
    assert any("guard: after round" in note and "the run stops" in note for note in notes)
    assert json.loads((folder / "evaluation.json").read_text())["stopped"].startswith("guard: ")
    assert main(["train", "--resume", str(folder), "--local"]) == 0
    assert metrics(folder)[-1]["round"] == done, "a stopped run stays stopped"


def test_the_guard_must_watch_something_that_is_measured(
    small: Make,
) -> None:
    with pytest.raises(
        UserError,
        match=r"guard\.limits\.0\.reward must be one of evaluate\.rewards \(none\), got 'shapes'",
    ):
        small_run("guard={limits: [{name: held_out, reward: shapes}]}")
