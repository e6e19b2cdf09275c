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


# Statements are built once: a ballot takes a dozen of them, and building costs more than asking.
_ME = sa.bindparam("me")
_CAMPAIGN = sa.bindparam("of_campaign")
_KIND = sa.bindparam("of_kind")
_BEFORE = sa.bindparam("before")
_NOW = sa.bindparam("now")
_ITEM = schema.item.c
_BALLOT = schema.ballot.c
_AGAIN = schema.item.alias("again")

_OVER = (
    sa.select(_BALLOT.id, _BALLOT.item, schema.annotator.c.status)
    .join(schema.annotator, schema.annotator.c.id == _BALLOT.annotator)
    .where(_BALLOT.campaign == _CAMPAIGN, _BALLOT.state == "open", _BALLOT.expires <= _NOW)
)
_MINE = sa.and_(_BALLOT.annotator == _ME, _BALLOT.campaign == _CAMPAIGN)
_COUNT = sa.select(sa.func.count()).select_from(schema.ballot).where(_MINE)
_OPEN = (
    sa.select(*_rows.BALLOT_COLUMNS)
    .select_from(_rows.OF_ITEM)
    .where(_MINE, _BALLOT.state == "open")
    .order_by(_BALLOT.number)
)
_ASKED = sa.exists().where(
    _BALLOT.item == _ITEM.id, _BALLOT.annotator == _ME, _BALLOT.state != "expired"
)
_CANDIDATES = (
    sa.select(schema.item)
    .where(
        _ITEM.campaign == _CAMPAIGN,
        _ITEM.kind == _KIND,
        _ITEM.withdrawn.is_(False),
        sa.or_(_ITEM.annotator == "", _ITEM.annotator == _ME),
        sa.or_(_ITEM.target == 0, _ITEM.held < _ITEM.target),
        ~_ASKED,
    )
    .order_by(_ITEM.number)
    .limit(WINDOW)
)
_REPEATABLE = (
    sa.select(*_rows.BALLOT_COLUMNS)
    .select_from(_rows.OF_ITEM)
    .where(
        _MINE,
        _BALLOT.state == "voted",
        _BALLOT.number <= _BEFORE,
        _ITEM.kind.in_(("live", "shared")),
        ~sa.exists().where(_AGAIN.c.of_ballot == _BALLOT.id),
    )
    .order_by(_BALLOT.number)
    .limit(WINDOW)
)
_OWN = sa.select(_ITEM.id).where(
    _ITEM.campaign == _CAMPAIGN,
    _ITEM.annotator == _ME,
    _ITEM.id != sa.bindparam("keep"),
    _ITEM.withdrawn.is_(False),
    ~sa.exists().where(_BALLOT.item == _ITEM.id, _BALLOT.state.in_(("voted", "skipped"))),
)


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
    over = connection.execute(_OVER, {"of_campaign": campaign, "now": now}).all()
    if over:
        ids = [row.id for row in over]
        table = schema.ballot
        connection.execute(sa.update(table).where(_BALLOT.id.in_(ids)).values(state="expired"))
        change_held(connection, (row.item for row in over if row.status == "active"), -1)


def withdraw_own(connection: Connection, campaign: str, annotator: str, keep: str) -> None:
    """Withdraws what was put together for one person and is not answered, the item ``keep`` aside;
    ballots of it that are open expire."""
    mine = {"of_campaign": campaign, "me": annotator, "keep": keep}
    items = connection.execute(_OWN, mine).scalars().all()
    of_them = sa.and_(_BALLOT.item.in_(items), _BALLOT.state == "open")
    opened = connection.execute(sa.select(_BALLOT.item).where(of_them)).scalars().all()
    connection.execute(sa.update(schema.ballot).where(of_them).values(state="expired"))
    connection.execute(sa.update(schema.item).where(_ITEM.id.in_(items)).values(withdrawn=True))
    change_held(connection, opened, -1)


def open_ballots(connection: Connection, campaign: str, annotator: str) -> list[Ballot]:
    """What a person has before them, the oldest first: one that was undone is older."""
    rows = connection.execute(_OPEN, {"of_campaign": campaign, "me": annotator})
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
    mine = {"of_campaign": campaign, "me": annotator}
    number = connection.execute(_COUNT, mine).scalar_one()
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


def _candidates(connection: Connection, campaign: str, annotator: str, kind: Kind) -> list[Item]:
    """The first items of a kind with a free place that this person was not asked before."""
    mine = {"of_campaign": campaign, "me": annotator, "of_kind": kind}
    rows = connection.execute(_CANDIDATES, mine)
    return [_rows.to_item(row) for row in rows.mappings()]


def _repeats(connection: Connection, campaign: str, annotator: str, before: int) -> list[Item]:
    """Repeats that could be asked: pairs of this person's answers that are long enough ago."""
    mine = {"of_campaign": campaign, "me": annotator, "before": before}
    rows = connection.execute(_REPEATABLE, mine)
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
