"""What happens when a person asks for a ballot, inside one transaction of the store.

A ballot is *open* until it is answered (*voted*, *skipped*) or its time is over (*expired*). Open
and voted ones hold a place of their item, those of people who are left out aside; an item whose
places are all held is dealt to nobody, so it gets no more votes than its target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from rlalign.ballots import _rows, schema
from rlalign.ballots.records import Ballot, Item, Kind, digest

HOLDING = ("open", "voted")
WINDOW = 256
"""Items that a rule chooses among: the first, by their numbers, that may be asked."""


class Dealer(Protocol):
    """Decides what is asked next; ``rlalign.ballots.deal`` has the usual one."""

    @property
    def repeat_after(self) -> int:
        """Ballots between an answer and its repeat."""
        ...

    def kind(self, available: Sequence[Kind], rng: np.random.Generator) -> tuple[Kind, float]:
        """The kind to deal and its probability."""
        ...

    def pick(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[int, float, str]:
        """(index, probability, rule) of one of the items, which are of one kind."""
        ...


def generator(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(int(digest(*key), 16)))


def change_held(connection: Connection, items: Iterable[str], by: int) -> None:
    """Adds to the held places of items, once for each time that one is named."""
    item = schema.item
    for one in items:
        connection.execute(sa.update(item).where(item.c.id == one).values(held=item.c.held + by))


def expire(connection: Connection, campaign: str, now: float) -> None:
    """Gives back the places of the ballots whose time is over."""
    ballot = schema.ballot
    annotator = schema.annotator
    over = connection.execute(
        sa.select(ballot.c.id, ballot.c.item, annotator.c.status)
        .join(annotator, annotator.c.id == ballot.c.annotator)
        .where(ballot.c.campaign == campaign, ballot.c.state == "open", ballot.c.expires <= now)
    ).all()
    if over:
        ids = [row.id for row in over]
        connection.execute(sa.update(ballot).where(ballot.c.id.in_(ids)).values(state="expired"))
        change_held(connection, (row.item for row in over if row.status == "active"), -1)


def open_ballots(connection: Connection, campaign: str, annotator: str) -> list[Ballot]:
    """What a person has before them, the oldest first: one that was undone is older."""
    ballot = schema.ballot
    rows = connection.execute(
        sa.select(*_rows.BALLOT_COLUMNS)
        .select_from(_rows.OF_ITEM)
        .where(
            ballot.c.annotator == annotator,
            ballot.c.campaign == campaign,
            ballot.c.state == "open",
        )
        .order_by(ballot.c.number)
    )
    return [_rows.to_ballot(row) for row in rows.mappings()]


def deal(
    connection: Connection,
    campaign: str,
    annotator: str,
    dealer: Dealer,
    until: tuple[float, float],
) -> Ballot | None:
    """A new ballot in the log, issued and expiring at the times ``until``; None where nothing is
    left to ask this person."""
    # draws depend on who is asked and how often they were, not on when
    number = _count(connection, campaign, annotator)
    rng = generator("deal", campaign, annotator, number)

    # gold and repeats come along with something to learn, never alone
    waiting: dict[Kind, list[Item]] = {}
    for kind in ("live", "shared"):
        waiting[kind] = _candidates(connection, campaign, annotator, kind)
    if not any(waiting.values()):
        return None
    waiting["gold"] = _candidates(connection, campaign, annotator, "gold")
    waiting["repeat"] = _repeats(connection, campaign, annotator, number - dealer.repeat_after)

    # the kind, then one of it
    kind, of_kind = dealer.kind([kind for kind, items in waiting.items() if items], rng)
    items = waiting[kind]
    index, of_item, rule = dealer.pick(items, rng)
    item = items[index]
    if kind == "repeat":
        add_items(connection, [item])
    ballot = Ballot(
        id=(name := digest("ballot", campaign, annotator, number)),
        annotator=annotator,
        number=number,
        item=item,
        order=_order(connection, item, annotator, name),
        rule=rule,
        propensity=of_kind * of_item * item.propensity,
        issued=until[0],
        expires=until[1],
    )
    connection.execute(sa.insert(schema.ballot).values(_rows.of_ballot(ballot)))
    change_held(connection, [item.id], 1)
    return ballot


def add_items(connection: Connection, items: Iterable[Item]) -> int:
    """Adds the items that are not there yet, and returns how many."""
    item = schema.item
    numbers: dict[str, int] = {}
    added = 0
    for one in items:
        if connection.execute(sa.select(item.c.id).where(item.c.id == one.id)).first():
            continue
        if one.campaign not in numbers:
            last = sa.select(sa.func.max(item.c.number)).where(item.c.campaign == one.campaign)
            found = connection.execute(last).scalar()
            numbers[one.campaign] = 0 if found is None else found + 1
        connection.execute(sa.insert(item).values(_rows.of_item(one, numbers[one.campaign])))
        numbers[one.campaign] += 1
        added += 1
    return added


def _count(connection: Connection, campaign: str, annotator: str) -> int:
    ballot = schema.ballot
    count = sa.select(sa.func.count()).where(
        ballot.c.annotator == annotator, ballot.c.campaign == campaign
    )
    return connection.execute(count).scalar_one()


def _candidates(connection: Connection, campaign: str, annotator: str, kind: Kind) -> list[Item]:
    """The first items of a kind with a free place that this person was not asked before."""
    item = schema.item
    ballot = schema.ballot
    asked = sa.exists().where(
        ballot.c.item == item.c.id, ballot.c.annotator == annotator, ballot.c.state != "expired"
    )
    rows = connection.execute(
        sa.select(item)
        .where(
            item.c.campaign == campaign,
            item.c.kind == kind,
            item.c.withdrawn.is_(False),
            item.c.annotator.in_(("", annotator)),
            sa.or_(item.c.target == 0, item.c.held < item.c.target),
            ~asked,
        )
        .order_by(item.c.number)
        .limit(WINDOW)
    )
    return [_rows.to_item(row) for row in rows.mappings()]


def _repeats(connection: Connection, campaign: str, annotator: str, before: int) -> list[Item]:
    """Repeats that could be asked: pairs of this person's answers that are long enough ago."""
    ballot = schema.ballot
    item = schema.item
    again = item.alias("again")
    repeated = sa.exists().where(again.c.of_ballot == ballot.c.id)
    rows = connection.execute(
        sa.select(*_rows.BALLOT_COLUMNS)
        .select_from(_rows.OF_ITEM)
        .where(
            ballot.c.annotator == annotator,
            ballot.c.campaign == campaign,
            ballot.c.state == "voted",
            ballot.c.number <= before,
            item.c.kind.in_(("live", "shared")),
            ~repeated,
        )
        .order_by(ballot.c.number)
        .limit(WINDOW)
    )
    answered = [_rows.to_ballot(row) for row in rows.mappings()]
    return [
        Item(
            id=digest("repeat", one.id),
            campaign=campaign,
            caption=one.item.caption,
            uids=one.item.uids,
            kind="repeat",
            of_ballot=one.id,
            annotator=annotator,
            rule=one.item.rule,
            target=1,
        )
        for one in answered
    ]


def _order(connection: Connection, item: Item, annotator: str, ballot: str) -> tuple[int, ...]:
    """The drawn order of a ballot's pictures; that of a repeat is the first one's, reversed."""
    if item.of_ballot:
        found = schema.ballot.c
        first = sa.select(found.order).where(found.id == item.of_ballot)
        return tuple(reversed(connection.execute(first).scalar_one()))
    drawn = generator("order", annotator, ballot).permutation(len(item.uids))
    return tuple(int(i) for i in drawn)
