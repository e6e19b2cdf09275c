"""The page over real HTTP on SQLite and on a PostgreSQL of the test's own: votes, kills, crowds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from rlalign.ballots.audit import audit
from rlalign.ballots.store import Store
from tests.ballots.conftest import KINDS
from tests.web.vote.crowd import click_together, lost_and_doubled
from tests.web.vote.made_desk import Process, fill, served
from tests.web.vote.person import Person

ON_EACH = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.promise if k != "sqlite" else ()) for k in KINDS]
)
Place = Callable[[str], str]


@ON_EACH
def test_a_crowd_at_the_page_loses_and_doubles_nothing(
    kind: str, new_place: Place, tmp_path: Path
) -> None:
    """Thirty people, sixty votes, a third of them sent twice, as fast as they come; one undo."""
    store = Store.open(new_place(kind))
    with served(fill(store, "pairs", target=20), tmp_path) as page:
        tally = click_together(page.url, people=30, due=[0.0] * 60)
        assert len(tally.votes) == 60
        assert lost_and_doubled(store, tally) == (0, 0)

        # one more takes a vote back and gives another
        person = Person(page.url)
        first = person.ballot()
        person.vote(first["ballot"], "left")
        assert person.undo().json()["ballot"] == first["ballot"]
        assert person.vote(first["ballot"], "right").json()["status"] == "recorded"
        votes = {vote.ballot.id: vote.answer.choice for vote in store.votes("shapes")}
        assert (len(votes), votes[first["ballot"]]) == (61, "right")
        assert person.get("/results.json").json()["stock"]["votes"] == 61
    assert audit(store, "shapes") == []
    store.close()


@pytest.mark.promise
@pytest.mark.parametrize("kind", KINDS)
def test_every_answered_vote_survives_kills_at_any_moment(
    kind: str, new_place: Place, tmp_path: Path
) -> None:
    """The server is killed from another thread, without looking."""
    place = new_place(kind)
    process = Process(place, tmp_path / "secret")
    process.start()
    person = Person(process.url)
    answered: list[str] = []
    for number in range(5):
        ballot = person.ballot()["ballot"]
        message = {"ballot": ballot, "nonce": f"click {number}", "choice": "left"}
        killer = threading.Thread(target=process.kill)
        killer.start()
        first = post(person, message)
        killer.join()
        process.start()
        second = post(person, message)
        assert first in ("", "recorded")
        assert second in (("again",) if first else ("recorded", "again"))
        answered.append(ballot)
    process.kill()
    store = Store.open(place)
    kept = [vote.ballot.id for vote in store.votes("shapes")]
    assert audit(store, "shapes") == []
    store.close()
    assert sorted(kept) == sorted(answered) and len(set(kept)) == 5


def post(person: Person, message: dict[str, str]) -> str:
    """What the server says of a vote, "" where it says nothing."""
    try:
        return person.post("/vote", message).json()["status"]
    except requests.RequestException:
        return ""
