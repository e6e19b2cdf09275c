"""People vote, and a run learns from it: the loop as a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment.loop import train_local
from rlalign.ballots.store import Store
from rlalign.cli import main
from rlalign.config import Run, load_run
from rlalign.data.shapes import captions
from rlalign.learning import checkpoint
from rlalign.runtime import train_on_ray
from tests.end_to_end.people import Loop, close_the_loop
from tests.processes import kill_first
from tests.runs import CONFIGS, assert_same_run, metrics, quiet
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


# --- a reward that is fitted anew on votes, and GRPO under it -------------------------------------

SMALL_GRPO = (
    "rounds=3",
    "plan.steps=3",
    "rewards=[{name: bradley_terry}]",
    "prompts.per_round=4",
    "prompts.samples_per_prompt=2",
    "prompts.per_unit=1",
    "learner.updates_per_round=2",
    "learner.epochs=1",
    "evaluate.every=0",
    "evaluate.prompts=4",
    "evaluate.grid=4",
    "refit.every=1",
    "refit.preferences.pairs_per_round=8",
    "refit.preferences.pairs_per_pass=8",
    "refit.held_out=0.5",
    "refit.fit={updates: 2, warmup: 0, lr: 1.0e-3}",
)


class Voters:
    """Give eight votes before the first round, and eight after each; what else happens after one is
    said by its number."""

    def __init__(self, place: Path, after: dict[int, Callable[[], None]] | None = None) -> None:
        self._voted = Voted(place, campaign="tiny_people_grpo", side=32)
        self._anna = self._voted.person()
        self._after = after or {}
        self._rounds = {0}
        self._vote()

    def _vote(self) -> None:
        first = 8 * len(self._rounds)
        for number in range(first, first + 8):
            self._voted.vote(self._anna, captions("train")[number], [200, number])

    def record(self, line: dict[str, Any]) -> None:
        number = line.get("round", 0)
        if "evaluation" in line or number in self._rounds:
            return
        self._rounds.add(number)
        self._vote()
        self._after.get(number, lambda: None)()


def of_votes(place: Path, *overrides: str) -> Run:
    ballots = f"{{store: {place}, least: 8, fresh: 8}}"
    more = f"refit.preferences.ballots={ballots}"
    return load_run(CONFIGS / "tiny_people_grpo.yaml", [*SMALL_GRPO, more, *overrides])


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


class Stopped(Exception):
    """As if the process were killed."""


def stop() -> None:
    raise Stopped


def kill_learner(folder: Path) -> None:
    process = checkpoint.writer(folder)
    assert process is not None
    os.kill(process, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
def test_grpo_under_a_refitted_reward_is_one_run_locally_resumed_and_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray with a reward worker killed after the first round, and the learner after the
    second."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    place = tmp_path / "whole.db"
    train_local(of_votes(place), tmp_path / "whole", resume=False, on_record=Voters(place).record)
    lines = metrics(tmp_path / "whole")
    assert [line["votes/cursor"] for line in lines] == [8, 16, 24]
    assert all("refit/accuracy" in line for line in lines)
    scores = [line["reward/bradley_terry/mean"] for line in lines]
    assert len(set(scores)) == 3

    # killed after the third round, of which no checkpoint was written; gone on with from the
    # second's
    place = tmp_path / "resumed.db"
    voters = Voters(place, {3: stop})
    with pytest.raises(Stopped):
        train_local(of_votes(place), tmp_path / "resumed", resume=False, on_record=voters.record)
    assert checkpoint.newest_round(tmp_path / "resumed") == 2
    train_local(of_votes(place), tmp_path / "resumed", resume=True, on_record=voters.record)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")

    place = tmp_path / "ray.db"
    folder = tmp_path / "ray"
    kills = {1: lambda: kill_first("reward"), 2: lambda: kill_learner(folder)}
    voters = Voters(place, kills)
    train_on_ray(of_votes(place), folder, resume=False, on_record=voters.record)
    assert_same_run(tmp_path / "ray", tmp_path / "whole")

    # both ends are scored by the last fit, by the run and by the command
    whole = evaluation(tmp_path / "whole")
    assert whole == evaluation(tmp_path / "resumed") == evaluation(tmp_path / "ray")
    assert main(["evaluate", str(tmp_path / "whole"), "--out", str(tmp_path / "again")]) == 0
    again = evaluation(tmp_path / "again")
    assert again["refit"] == "bradley_terry is the run's last fit, on votes up to number 24"
    assert [again[side] for side in ("base", "aligned")] == [whole["base"], whole["aligned"]]

    # or by another reward, where that is asked for
    own = ["rewards=[{name: bradley_terry}]", "--out", str(tmp_path / "before")]
    assert main(["evaluate", str(tmp_path / "whole"), *own]) == 0
    before = evaluation(tmp_path / "before")
    assert "as it was before any fit on votes" in before["refit"]
    mean = "reward/bradley_terry/mean"
    assert before["aligned"][mean] != whole["aligned"][mean]


@pytest.mark.promise
def test_a_line_of_a_stale_round_names_the_fit_that_scored_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds 1 and 2 are ordered before the first is learned from, and the third after it."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)
    place = tmp_path / "votes.db"
    run = of_votes(place, "runtime.max_staleness=1", "checkpoint.every=3")
    train_local(run, tmp_path / "run", resume=False, on_record=Voters(place).record)
    lines = metrics(tmp_path / "run")
    assert [line["staleness/max"] for line in lines] == [0, 1, 1]
    assert [line["votes/cursor"] for line in lines] == [8, 8, 16]
    assert lines[0]["refit/loss"] == lines[1]["refit/loss"] != lines[2]["refit/loss"]


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
