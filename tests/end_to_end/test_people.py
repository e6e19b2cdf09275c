"""People vote, and a run learns from it: the loop as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlalign.ballots.store import Store
from tests.end_to_end.people import Loop, close_the_loop
from tests.runs import assert_same_run, metrics
from tests.votes import Voted

SMALL_RUN = (
    "rounds=2",
    "plan.steps=2",
    "preferences.ballots.fresh=6",
    "preferences.ballots.least=6",
    "preferences.pairs_per_round=8",
    "preferences.pairs_per_pass=4",
    "algorithm.draws=1",
    "learner.updates_per_round=2",
    "evaluate.every=0",
    "evaluate.prompts=2",
    "evaluate.grid=2",
)
SMALL_VOTE = ("votes_per_round=6", "prompts.per_round=6", "source.per_prompt=2", "rule=random")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    folder = tmp_path_factory.mktemp("loop")
    vote = (*SMALL_VOTE, "simulate.votes=12")
    return close_the_loop(folder / "run", folder / "votes.db", run=SMALL_RUN, vote=vote)


@pytest.mark.promise
def test_each_round_learns_from_votes_on_its_own_pictures(small: Loop) -> None:
    assert small.given == 12
    lines = metrics(small.run)
    assert [line["votes/all"] for line in lines] == [6, 12]
    assert [line["votes/fresh"] for line in lines] == [6, 6]
    store = Store.open(small.store)
    cursors = json.loads((small.run / "votes.json").read_text())["cursors"]
    for number, upto in enumerate(cursors):
        votes = list(store.votes("tiny_people", cursors[number - 1] if number else 0, upto))
        uids = [uid for vote in votes for uid in vote.ballot.shown]
        rounds = [picture.plan["round"] for uid in uids if (picture := store.picture(uid))]
        assert rounds == [number] * 12, "drawn by the checkpoint that the round starts from"
    assert (small.run / "evaluation.json").is_file()


@pytest.mark.promise
def test_a_resumed_run_sees_the_votes_that_it_saw(small: Loop, tmp_path: Path) -> None:
    """A second round that is done again, as after a kill, once the store has more votes."""
    again = tmp_path / "run"
    shutil.copytree(small.run, again)
    shutil.rmtree(again / "checkpoints" / "round-00002")
    (again / "evaluation.json").unlink()
    more = Voted(small.store, campaign="tiny_people", side=32)
    more.vote(more.person(), "a red circle", [10, 20])
    close_the_loop(
        again, small.store, run=SMALL_RUN, vote=(*SMALL_VOTE, "simulate.votes=1"), resume=True
    )
    assert_same_run(small.run, again)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_600_votes_raise_the_hidden_utility(seed: int, tmp_path: Path) -> None:
    """The verifier on held-out captions, which no person was asked about."""
    place = (tmp_path / "run", tmp_path / "votes.db")
    loop = close_the_loop(*place, run=(f"seed={seed}",), vote=(f"seed={seed}",))
    result = json.loads((loop.run / "evaluation.json").read_text(encoding="utf-8"))
    base, aligned = (result[side]["reward/shapes/mean"] for side in ("base", "aligned"))
    print(f"seed {seed}: {base:.3f} to {aligned:.3f}; two people agree on {loop.agreement:.1%}")
    assert loop.given == 600
    assert 0.65 <= loop.agreement <= 0.75
    assert aligned - base >= 0.10
