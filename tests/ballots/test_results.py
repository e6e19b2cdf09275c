"""All results of a campaign: simulated people with known habits on a real store."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlalign.ballots.deal import Deal
from rlalign.ballots.quality import Rules
from rlalign.ballots.records import Answer, Campaign, Item, Picture
from rlalign.ballots.results import _rule_of, collect_results, rank_policies
from rlalign.ballots.store import Store
from tests.ballots.made_votes import made_vote

POLICIES = {"a": "base", "b": "tuned", "c": "worse"}
STRENGTH = {"base": 0.0, "tuned": 1.2, "worse": -0.8}


@pytest.fixture(scope="module")
def store(new_place: Callable[[str], str]) -> Any:
    """Five people, 40 ballots each: four choose by strength with a lean to the left, one always
    takes the right one at once."""
    opened = Store.open(new_place("sqlite"))
    opened.create_campaign(Campaign(id="c", mode="ab"))
    names = list(POLICIES.items())
    for number in range(60):
        for letter, policy in names:
            uid = f"{letter}{number}"
            opened.add_picture(Picture(uid=uid, caption="x", policy=policy), uid.encode())
    for number in range(60):
        two = [names[number % 3][0], names[(number + 1) % 3][0]]
        uids = (f"{two[0]}{number}", f"{two[1]}{number}")
        kind = "shared" if number < 12 else "gold" if number > 50 else "live"
        truth = max(uids, key=lambda uid: STRENGTH[POLICIES[uid[0]]]) if kind == "gold" else ""
        target = {"shared": 5, "gold": 0, "live": 4}[kind]
        item = Item(
            id=str(number), campaign="c", caption=f"caption {number}", uids=uids, target=target
        )
        opened.add_items([Item(**{**vars(item), "kind": kind, "truth": truth})])
    rng = np.random.default_rng(0)
    people = [opened.join(f"person {n}", f"token {n}", "1", 0.0).id for n in range(5)]
    deal = Deal(gold=0.15, repeat=0.1, shared=0.2)
    for number in range(40):
        for person in people:
            ballot = opened.issue("c", person, 100.0 * number, deal)
            if ballot is None:
                continue
            strength = [STRENGTH[POLICIES[uid[0]]] for uid in ballot.shown]
            left = rng.random() < 1 / (1 + np.exp(strength[1] - strength[0] - 0.8))
            quick = person == people[4]
            choice = "left" if left and not quick else "right"
            answer = Answer(nonce="n", choice=choice, decide_ms=90.0 if quick else 1500.0)
            opened.vote(person, ballot.id, answer, 100.0 * number)
    yield opened
    opened.close()


def test_results_say_what_people_did(store: Store) -> None:
    found = collect_results(store, "c", 4000.0, Rules(min_ms=300.0), anchor="base")
    (quick,) = [one for one in found.people if one.fault]
    assert quick.fault == "median of 90 ms, 300 asked"
    assert quick.quality.left.count == 0
    assert sum(found.choices.values()) == sum(
        one.quality.votes for one in found.people if not one.fault
    )
    low, high = found.left.interval
    assert 0.5 < low < high < 1.0, "the lean to the left is seen"
    assert found.gold.of > 10
    assert found.repeats.of > 5
    assert 0.0 < found.alpha < 0.7
    assert found.shared >= 12
    asked = found.choices["left"] + found.choices["right"] - found.gold.of - found.repeats.of
    assert found.by_rule == {"random": asked}
    assert sum(count for _, count in found.per_hour) == sum(found.choices.values())
    assert [hour for hour, _ in found.per_hour] == [0.0, 3600.0]
    assert all(sum(line["votes"]) + line["none"] > 1 for line in found.disagreement)


def test_a_votes_rule_is_that_of_the_deal_or_of_the_pair() -> None:
    vote = made_vote(1, "anna", "left")
    dealt = replace(vote, ballot=replace(vote.ballot, rule="fisher"))
    paired = replace(vote, ballot=replace(vote.ballot, item=replace(vote.ballot.item, rule="gap")))
    assert [_rule_of(one) for one in (vote, dealt, paired)] == ["random", "fisher", "gap"]


def test_the_rankings_intervals_hold_the_strengths_and_the_bias(store: Store) -> None:
    ranking = collect_results(store, "c", 4000.0, Rules(min_ms=300.0), anchor="base").ranking
    assert ranking is not None
    assert [one.policy for one in ranking.standings] == ["tuned", "base", "worse"]
    for one in ranking.standings:
        assert one.low <= STRENGTH[one.policy] <= one.high
    assert ranking.left_low <= 0.8 <= ranking.left_high
    tuned, base, _ = ranking.standings
    assert base.more_votes is None
    assert base.win_rate == pytest.approx(0.5)
    assert tuned.more_votes is not None
    assert 0.6 < tuned.win_rate < 0.95
    wins = np.array(ranking.wins)
    assert [one.wins for one in ranking.standings] == wins.sum(axis=1).tolist()
    assert [one.votes for one in ranking.standings] == (wins + wins.T).sum(axis=1).tolist()


def test_who_was_left_out_by_hand_counts_again_after_a_return(store: Store) -> None:
    before = collect_results(store, "c", 4000.0)
    person = before.people[0].quality.annotator
    store.set_status(person, "left_out", "a test", 5000.0)
    without = collect_results(store, "c", 5000.0)
    assert sum(without.choices.values()) < sum(before.choices.values())
    assert without.people[0].status == "left_out"
    store.set_status(person, "active", "", 5001.0)
    after = collect_results(store, "c", 5001.0)
    assert after.choices == before.choices
    assert after.ranking == before.ranking


def test_results_are_json(store: Store) -> None:
    found = collect_results(store, "c", 4000.0).to_json()
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["left"]["interval"] == list(found["left"]["interval"])


def test_a_campaign_without_votes_has_results_too(new_place: Callable[[str], str]) -> None:
    empty = Store.open(new_place("sqlite"))
    empty.create_campaign(Campaign(id="c", mode="pairs"))
    found = collect_results(empty, "c", 0.0)
    assert found.ranking is None
    assert found.to_json()["alpha"] is None
    empty.close()


def test_a_ranking_of_three_is_three_meetings() -> None:
    vote = made_vote(1, "ann", "rank", uids=("a", "b", "c"), order=(2, 0, 1))
    answer = Answer(nonce="n", choice="rank", ranking=((1,), (0, 2)))  # a before c and b
    vote = type(vote)(**{**vars(vote), "answer": answer})
    assert vote.pairs == (("c", "a", "right"), ("c", "b", "tie"), ("a", "b", "left"))
    ranking = rank_policies([vote], POLICIES, anchor="tuned")
    assert ranking is not None
    assert ranking.anchor == "tuned"
    assert ranking.standings[0].policy == "base"
    assert ranking.standings[0].wins == 2.0


def test_the_room_loads_no_torch() -> None:
    """Neither does it load Ray, a web framework or scipy until an interval is asked for."""
    code = (
        "import sys, rlalign.ballots.results, rlalign.ballots.label_studio, rlalign.ballots.choose;"
        "print([m for m in ('torch', 'ray', 'starlette', 'scipy', 'alembic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
