"""Simulated people who vote on a store, as a page's threads do it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer, Campaign, Item
from rlalign.ballots.store import Store

CAMPAIGN = "crowd"


@dataclass
class Tally:
    """What was acknowledged, and how long each vote took from the click to the next ballot."""

    seqs: dict[tuple[str, str], int] = field(default_factory=dict)
    """(ballot, nonce) -> number in the log."""
    vote_s: list[float] = field(default_factory=list)
    issue_s: list[float] = field(default_factory=list)


def gather(store: Store, people: int, items: int, target: int) -> list[str]:
    """A campaign with people in it; their ids."""
    store.create_campaign(Campaign(id=CAMPAIGN, mode="pairs"))
    made = (
        Item(
            id=f"item {number}",
            campaign=CAMPAIGN,
            caption="a caption",
            uids=(f"{number}a", f"{number}b"),
            target=target,
        )
        for number in range(items)
    )
    store.add_items(made)
    return [store.join(f"person {n}", f"token {n}", "1", 0.0).id for n in range(people)]


def vote_once(store: Store, person: str, click: int, now: float, tally: Tally) -> bool:
    """One person's next ballot and vote, every third click sent twice; False where nothing is
    left."""
    began = time.perf_counter()
    ballot = store.issue(CAMPAIGN, person, now, Deal())
    tally.issue_s.append(time.perf_counter() - began)
    if ballot is None:
        return False
    answer = Answer(nonce=f"click {click}", choice="left" if click % 2 else "right")
    began = time.perf_counter()
    receipt = store.vote(person, ballot.id, answer, now)
    tally.vote_s.append(time.perf_counter() - began)
    assert receipt.outcome == "recorded"
    tally.seqs[ballot.id, answer.nonce] = receipt.seq
    if click % 3 == 0:
        again = store.vote(person, ballot.id, answer, now)
        assert (again.outcome, again.seq) == ("again", receipt.seq)
    return True


def vote_together(stores: Sequence[Store], people: Sequence[str], each: int, tally: Tally) -> None:
    """Everybody votes ``each`` times, from several threads, over several stores of one place."""

    def work(click: int) -> None:
        vote_once(stores[click % len(stores)], people[click % len(people)], click, 1.0, tally)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(each * len(people))))


def lost_and_doubled(store: Store, tally: Tally) -> tuple[int, int]:
    """Acknowledged votes that are not there, and votes that are there twice."""
    votes = list(store.votes(CAMPAIGN))
    there = {(vote.ballot.id, vote.answer.nonce): vote.seq for vote in votes}
    lost = sum(there.get(key) != seq for key, seq in tally.seqs.items())
    return lost, len(votes) - len({vote.ballot.id for vote in votes})


def milliseconds(seconds: Sequence[float]) -> str:
    """Median, 95th percentile and largest."""
    found = np.percentile(np.array(seconds) * 1000, [50, 95, 100])
    return " / ".join(f"{one:.1f}" for one in found)
