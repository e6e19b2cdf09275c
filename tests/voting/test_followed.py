"""Pictures of a run that learns: which round does, and from which votes."""

from __future__ import annotations

import json
from pathlib import Path

from rlalign.alignment.cursors import FILE
from rlalign.config import dump, load_begun, load_run
from rlalign.voting.followed import FollowedSource
from tests.runs import CONFIGS


def source_of(folder: Path) -> FollowedSource:
    return FollowedSource(folder=folder, seed=0, count=2, rows=2)


def reach(folder: Path, round: int, cursors: list[int]) -> None:
    """A run's checkpoint by its name, and what it has written down of votes."""
    (folder / "checkpoints" / f"round-{round:05d}").mkdir(parents=True)
    (folder / FILE).write_text(json.dumps({"cursors": cursors}))


def test_the_round_that_learns_and_from_which_votes(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    assert (source.round, source.votes) == (1, None), "it waits for votes"
    (tmp_path / FILE).write_text(json.dumps({"cursors": [100]}))
    assert (source.round, source.votes) == (1, (1, 100))
    reach(tmp_path, 1, [100])
    assert (source.round, source.votes) == (2, None)
    (tmp_path / FILE).write_text(json.dumps({"cursors": [100, 230]}))
    assert (source.round, source.votes) == (2, (101, 230))
    reach(tmp_path, 2, [100, 230, 230])
    assert (source.round, source.votes) == (3, None), "earlier votes alone"


def test_of_a_reward_that_is_fitted_anew_the_votes_of_the_fit(tmp_path: Path) -> None:
    """Every second round: the votes of rounds 3 and 4 are those of the second fit."""
    run = load_run(CONFIGS / "tiny_people_grpo.yaml")
    (tmp_path / "config.yaml").write_text(dump(run))
    source = source_of(tmp_path)
    source._run = load_begun(tmp_path / "config.yaml")
    reach(tmp_path, 2, [100, 200])
    assert (source.round, source.votes) == (3, (101, 200))
    reach(tmp_path, 3, [100, 200])
    assert source.votes == (101, 200)
