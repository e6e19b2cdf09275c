"""The store against a model of it: whatever is asked in whatever order, by people in two processes,
one of which may be killed while it writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from rlalign.ballots import schema
from rlalign.ballots._dealing import generator
from rlalign.ballots.audit import audit
from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer, Ballot, Campaign, Item, Refused
from rlalign.ballots.store import Store
from tests.ballots.conftest import KINDS
from tests.ballots.writers import KEEP_S, votes_before_death

PEOPLE = 3
CHOICES = ("left", "right", "tie", "both_bad", "skip")
people = st.integers(0, PEOPLE - 1)
any_one = st.integers(0, 10_000)
"""Chooses among what there is, however much that is: what is drawn must not depend on it."""
stores = st.integers(0, 1)
_campaigns = itertools.count()


class SameDeal(Deal):
    """Draws by its own count, whatever the campaign is called."""

    def __init__(self) -> None:
        super().__init__(gold=0.2, repeat=0.3, shared=0.2, repeat_after=2)
        object.__setattr__(self, "count", itertools.count())

    def kind(self, available: Any, rng: Any) -> Any:
        return super().kind(available, generator("same", next(self.count)))  # type: ignore[attr-defined]

    def pick(self, items: Any, rng: Any) -> Any:
        return super().pick(items, generator("same", next(self.count)))  # type: ignore[attr-defined]


@dataclass
class Given:
    """What the model knows of a ballot."""

    ballot: Ballot
    expires: float
    nonces: dict[str, str] = field(default_factory=dict)
    """Nonce -> choice, of all that was recorded."""
    stands: str = ""
    """The nonce of the vote that stands."""


class Voting(RuleBasedStateMachine):
    """Three people, two processes' stores, a clock that the rules move."""

    place: str

    def __init__(self) -> None:
        super().__init__()
        self.stores = [Store.open(self.place), Store.open(self.place)]
        self.campaign = f"c{next(_campaigns)}"
        self.now = 0.0
        self.dealer = SameDeal()
        store = self.stores[0]
        store.create_campaign(Campaign(id=self.campaign, mode="pairs"))
        self.items = [self.item(number) for number in range(10)]
        assert store.add_items([*self.items, self.items[0]]) == len(self.items)
        tokens = [f"{self.campaign} {number}" for number in range(PEOPLE)]
        self.people = [store.join("x", token, "1", 0.0).id for token in tokens]
        assert store.join("again", tokens[0], "1", 1.0).id == self.people[0]
        self.given: dict[str, Given] = {}
        self.order: list[tuple[str, str]] = []
        """(ballot, nonce) of the votes in the log, also of those that were undone."""
        self.undone: dict[tuple[str, str], str] = {}
        """(person, nonce of the undo) -> ballot."""
        self.nonces = itertools.count()

    def item(self, number: int) -> Item:
        kind = "gold" if number == 9 else "shared" if number > 5 else "live"
        target = {"gold": 0, "shared": 2, "live": 1}[kind]
        return Item(
            id=f"{self.campaign} {number}",
            campaign=self.campaign,
            caption="a caption",
            uids=(f"{number}a", f"{number}b"),
            kind=kind,
            truth=f"{number}a" if kind == "gold" else "",
            target=target,
        )

    def teardown(self) -> None:
        for store in self.stores:
            store.close()

    # --- the model --------------------------------------------------------------------------------

    def is_open(self, one: Given) -> bool:
        return not one.stands and one.expires > self.now

    def open_of(self, who: str) -> list[Given]:
        mine = [g for g in self.given.values() if g.ballot.annotator == who and self.is_open(g)]
        return sorted(mine, key=lambda g: g.ballot.number)

    def holds(self, one: Given) -> bool:
        return one.nonces[one.stands] != "skip" if one.stands else one.expires > self.now

    def held(self, item: Item) -> int:
        return sum(self.holds(g) for g in self.given.values() if g.ballot.item.id == item.id)

    def askable(self, who: str) -> list[Item]:
        """Live and shared items that may be dealt to a person."""
        asked = {
            g.ballot.item.id
            for g in self.given.values()
            if g.ballot.annotator == who and (g.stands or g.expires > self.now)
        }
        return [
            item
            for item in self.items
            if item.kind != "gold" and item.id not in asked and self.held(item) < item.target
        ]

    def learn(self, ballot: Ballot) -> None:
        """A ballot that was not there before must be a right one."""
        who = ballot.annotator
        assert self.askable(who), "nothing could be asked"
        numbers = [g.ballot.number for g in self.given.values() if g.ballot.annotator == who]
        assert ballot.number == len(numbers)
        assert sorted(ballot.order) == [0, 1]
        assert 0 < ballot.propensity <= 1
        if ballot.item.kind == "repeat":
            first = self.given[ballot.item.of_ballot]
            assert first.ballot.annotator == who
            assert first.stands
            assert ballot.shown == tuple(reversed(first.ballot.shown))
        elif ballot.item.kind != "gold":
            assert ballot.item in self.askable(who)
        self.given[ballot.id] = Given(ballot=ballot, expires=ballot.expires)

    # --- what people do ---------------------------------------------------------------------------

    @rule(who=people, store=stores, ahead=st.integers(0, 1))
    def issue(self, who: int, store: int, ahead: int) -> None:
        person = self.people[who]
        if ahead and not self.open_of(person):
            self.issue(who, store, 0)
        known = self.open_of(person)
        if ahead > len(known):
            return
        ballot = self.stores[store].issue(
            self.campaign,
            person,
            self.now,
            self.dealer,
            keep_s=KEEP_S,
            ahead=ahead,
        )
        if ballot is None:
            assert len(known) == ahead
            assert not self.askable(person)
            return
        if ahead < len(known):
            assert ballot.id == known[ahead].ballot.id, "a reload shows the same ballot"
        else:
            self.learn(ballot)
        assert ballot.expires == self.now + KEEP_S
        self.given[ballot.id].expires = ballot.expires

    @rule(which=any_one, click=any_one, who=people, store=stores, choice=st.sampled_from(CHOICES))
    def vote(self, which: int, click: int, who: int, store: int, choice: str) -> None:
        """On any ballot: one's own, another's, one that is over; with a new click or an old one."""
        if not self.given:
            return
        one = list(self.given.values())[-1 - which % len(self.given)]
        clicks = [f"n{next(self.nonces)}", *one.nonces]
        nonce = clicks[click % len(clicks)]
        person = self.people[who] if which % 5 == 0 else one.ballot.annotator
        answer = Answer(nonce=nonce, choice=choice)  # type: ignore[arg-type]

        def send() -> str:
            try:
                return self.stores[store].vote(person, one.ballot.id, answer, self.now).outcome
            except Refused as refused:
                return refused.reason

        if person != one.ballot.annotator:
            assert send() == "not_yours"
        elif one.stands or nonce in one.nonces:
            assert send() == "again"
        elif not self.is_open(one):
            assert send() == "expired"
        else:
            assert send() == "recorded"
            one.nonces[nonce] = choice
            one.stands = nonce
            self.order.append((one.ballot.id, nonce))
            assert send() == "again", "a double click"

    @rule(who=people, store=stores)
    def vote_as_told(self, who: int, store: int) -> None:
        """The way it goes mostly: the next ballot is shown and answered."""
        self.issue(who, store, 0)
        ready = self.open_of(self.people[who])
        if ready:
            one = ready[0]
            nonce = f"n{next(self.nonces)}"
            answer = Answer(nonce=nonce, choice="left", decide_ms=700.0)
            receipt = self.stores[store].vote(self.people[who], one.ballot.id, answer, self.now)
            assert receipt.outcome == "recorded"
            one.nonces[nonce] = "left"
            one.stands = nonce
            self.order.append((one.ballot.id, nonce))

    @rule(who=people, store=stores)
    def undo(self, who: int, store: int) -> None:
        person = self.people[who]
        mine = [
            (ballot, nonce)
            for ballot, nonce in self.order
            if self.given[ballot].ballot.annotator == person and self.given[ballot].stands == nonce
        ]
        nonce = f"u{next(self.nonces)}"
        send: Callable[[], Any] = lambda: self.stores[store].undo(  # noqa: E731
            self.campaign, person, nonce, self.now, keep_s=KEEP_S
        )
        if not mine:
            assert send() is None
            return
        one = self.given[mine[-1][0]]
        item = one.ballot.item
        skipped = one.nonces[one.stands] == "skip"
        if skipped and 0 < item.target <= self.held(item):
            with pytest.raises(Refused, match="others have voted") as refused:
                send()
            assert refused.value.reason == "full"
            return
        ballot = send()
        assert ballot.id == one.ballot.id
        assert send().id == ballot.id, "the same click again takes back no other vote"
        one.stands = ""
        one.expires = max(one.expires, self.now + KEEP_S)
        self.undone[person, nonce] = ballot.id

    @rule(which=any_one, store=stores)
    def repeat_an_undo(self, which: int, store: int) -> None:
        """A click that comes again much later changes nothing."""
        if not self.undone:
            return
        (person, nonce), ballot = list(self.undone.items())[which % len(self.undone)]
        found = self.stores[store].undo(self.campaign, person, nonce, self.now, keep_s=KEEP_S)
        assert found is not None
        assert found.id == ballot

    @rule(seconds=st.sampled_from([1.0, KEEP_S / 2, KEEP_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(store=stores)
    def reopen(self, store: int) -> None:
        self.stores[store].close()
        self.stores[store] = Store.open(self.place)

    @rule(count=st.integers(0, 3), store=stores)
    def kill_a_voter(self, count: int, store: int) -> None:
        """A process that deals and votes is killed: all that it saw recorded is there, and at most
        one vote more, which it could not see any more."""
        mark = f"killed {next(self.nonces)}"
        said = votes_before_death(
            self.place, self.campaign, self.people, self.now, count=count, mark=mark
        )
        self.stores[store].close()
        self.stores[store] = Store.open(self.place)
        # a server may still be committing what the dead asked for: the next to write comes after
        self.stores[store].add_items([])
        votes = list(self.stores[store].votes(self.campaign))
        new = [v for v in votes if (v.ballot.id, v.answer.nonce) not in self.order]
        assert [(v.ballot.id, v.answer.nonce) for v in new][: len(said)] == said
        assert len(said) <= len(new) <= len(said) + 1

        # the model learns what happened
        for vote in new:
            if vote.ballot.id not in self.given:
                self.learn(vote.ballot)
            one = self.given[vote.ballot.id]
            one.nonces[vote.answer.nonce] = "left"
            one.stands = vote.answer.nonce
            self.order.append((vote.ballot.id, vote.answer.nonce))
        with self.stores[store].reading() as connection:
            mine = sa.select(schema.ballot.c.id).where(schema.ballot.c.campaign == self.campaign)
            names = connection.execute(mine).scalars().all()
        dealt = [name for name in names if name not in self.given]
        assert len(dealt) <= 1, "it deals one ballot, then waits for its vote"
        for name in names:
            ballot = self.stores[store].ballot(name)
            assert ballot is not None
            if name in dealt:
                self.learn(ballot)
            self.given[name].expires = ballot.expires

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def the_votes_are_those_that_stand(self) -> None:
        votes = list(self.stores[0].votes(self.campaign))
        stands = [(b, n) for b, n in self.order if self.given[b].stands == n]
        assert len({ballot for ballot, _ in stands}) == len(stands)
        for vote in votes:
            one = self.given[vote.ballot.id]
            assert vote.answer.choice == one.nonces[one.stands]
            assert vote.ballot.shown == one.ballot.shown

    @invariant()
    def no_item_has_more_than_its_target(self) -> None:
        for item in self.items:
            assert item.target == 0 or self.held(item) <= item.target

    @invariant()
    def the_store_agrees_with_its_log(self) -> None:
        assert audit(self.stores[1], self.campaign) == []


@pytest.mark.parametrize(
    ("kind", "examples"),
    [("sqlite", 2), *(pytest.param(kind, 8, marks=pytest.mark.promise) for kind in KINDS)],
)
def test_the_store_does_what_its_model_does(
    kind: str, examples: int, new_place: Callable[[str], str]
) -> None:
    machine = type("VotingIn" + kind, (Voting,), {"place": new_place(kind)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],  # a failure is shown as it came
            suppress_health_check=list(HealthCheck),
        ),
    )
