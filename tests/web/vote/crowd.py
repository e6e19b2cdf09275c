"""Many people at a page over real HTTP, who click at given times."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rlalign.ballots.store import Store
from tests.web.vote.person import Person

THREADS = 16


@dataclass
class Tally:
    """What the page has acknowledged, and how long that took."""

    votes: dict[str, str] = field(default_factory=dict)
    """Ballot -> nonce."""
    vote_s: list[float] = field(default_factory=list)
    """From a vote to its answer, which has the next ballot."""
    click_s: list[float] = field(default_factory=list)
    """From when a click was due to the answer, with the pictures fetched in between."""


class Clicker(Person):
    """A person who keeps the ballot that the last answer has brought."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._open: dict[str, Any] = {}
        self._turn = threading.Lock()

    def click(self, number: int, tally: Tally, due: float) -> None:
        """Looks at the pictures and chooses; every third click comes twice."""
        with self._turn:
            found = self._open or self.ballot()
            for key in found["pictures"]:
                assert self.get(f"/picture/{key}").status_code == 200
            nonce = f"click {number}"
            message = {"ballot": found["ballot"], "nonce": nonce, "choice": "left"}
            sent = time.perf_counter()
            answer = self.post("/vote", message).json()
            now = time.perf_counter()
            assert answer["status"] == "recorded", answer
            tally.votes[found["ballot"]] = nonce
            tally.vote_s.append(now - sent)
            tally.click_s.append(now - due)
            if number % 3 == 0:
                assert self.post("/vote", message).json()["status"] == "again"
            self._open = answer["next"]
            # answers are kept by a person, and nobody looks at these
            self.answers.clear()


def click_together(url: str, people: int, due: Sequence[float]) -> Tally:
    """People join, and take turns with clicks that come ``due`` seconds after that, however long
    others take."""
    with ThreadPoolExecutor(THREADS) as pool:
        crowd = list(pool.map(lambda _: Clicker(url), range(people)))
        tally = Tally()
        began = time.perf_counter()
        clicks = []
        for number, seconds in enumerate(due):
            time.sleep(max(began + seconds - time.perf_counter(), 0.0))
            person = crowd[number % people]
            clicks.append(pool.submit(person.click, number, tally, began + seconds))
        for click in clicks:
            click.result()
    return tally


def lost_and_doubled(store: Store, tally: Tally) -> tuple[int, int]:
    """Acknowledged votes that are not there, and votes beyond one of a ballot or that nobody
    gave."""
    votes = [(vote.ballot.id, vote.answer.nonce) for vote in store.votes("shapes")]
    lost = sum((ballot, nonce) not in votes for ballot, nonce in tally.votes.items())
    return lost, len(votes) - len(tally.votes) + lost
