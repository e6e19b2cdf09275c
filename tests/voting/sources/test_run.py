"""The policy of a run that learns: before there is one, which round learns, and from which
votes. Whole loops are in tests/end_to_end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlalign.alignment.cursors import FILE
from rlalign.config import dump, load_begun, load_run
from rlalign.voting.pictures import Pending
from rlalign.voting.serve import open_source
from rlalign.voting.settings import parse_vote
from rlalign.voting.sources.run import RunSource
from tests.runs import CONFIGS


def test_a_run_that_has_not_begun_is_named_to_those_who_wait(tmp_path: Path) -> None:
    vote = parse_vote({"name": "r", "source": {"run": str(tmp_path / "mine")}})
    source = open_source(vote)
    source.take_up(iter([]))
    with pytest.raises(Pending, match="the run mine has not begun; rlalign train begins it") as why:
        source.batch()
    assert why.value.code == "broken", "nobody is told that a model learns"
    assert source.prompts() == [] and not source.renewed
    source.close()


def source_of(folder: Path) -> RunSource:
    return RunSource(folder=folder, seed=0, count=2, rows=2)


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
