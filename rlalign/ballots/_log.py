"""Rows of the log and of the people in it, inside one transaction of the store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from rlalign.ballots import _rows, schema
from rlalign.ballots._dealing import HOLDING, change_held
from rlalign.ballots._rows import Row
from rlalign.ballots.connect import LOG
from rlalign.ballots.records import Annotator, Answer, Ballot, Campaign, Refused, Status, digest

LAST = sa.select(schema.counter.c.value).where(schema.counter.c.name == LOG)
"""The number of the log's newest row."""

_COUNTER = schema.counter
_NEXT = sa.update(_COUNTER).where(_COUNTER.c.name == LOG).values(value=_COUNTER.c.value + 1)

PAGE = 500
"""Votes that are read in one transaction."""

_NAME = sa.bindparam("name")
_BALLOT = _rows.BALLOT_COLUMNS
_OF_VOTE = _rows.OF_ITEM.join(schema.vote, schema.vote.c.ballot == schema.ballot.c.id)

_PERSON = sa.select(schema.annotator).where(schema.annotator.c.id == _NAME)
_ONE_BALLOT = sa.select(*_BALLOT).select_from(_rows.OF_ITEM).where(schema.ballot.c.id == _NAME)
_RECORDED = (
    sa.select(schema.vote.c.seq)
    .outerjoin(schema.undo, schema.undo.c.vote == schema.vote.c.seq)
    .where(
        schema.vote.c.ballot == _NAME,
        sa.or_(schema.undo.c.seq.is_(None), schema.vote.c.nonce == sa.bindparam("click")),
    )
    .order_by(schema.vote.c.seq.desc())
)


def next_number(connection: Connection) -> int:
    """The number of a new row of the log."""
    connection.execute(_NEXT)
    return connection.execute(LAST).scalar_one()


def find_campaign(connection: Connection, name: str) -> Campaign | None:
    table = schema.campaign
    row = connection.execute(sa.select(table).where(table.c.id == name)).mappings().first()
    return None if row is None else Campaign(**row)


# --- people --------------------------------------------------------------------------------------


def add_annotator(
    connection: Connection, name: str, token: str, consent: str, now: float
) -> Annotator:
    count = connection.execute(sa.select(sa.func.count()).select_from(schema.annotator))
    row = {
        "id": digest("annotator", count.scalar_one()),
        "name": name,
        "token_digest": digest("token", token),
        "consent": consent,
        "status": "active",
        "joined": now,
    }
    connection.execute(sa.insert(schema.annotator).values(row))
    return _rows.to_annotator(row)


def annotator_of(connection: Connection, token: str) -> Annotator | None:
    table = schema.annotator
    mine = table.c.token_digest == digest("token", token)
    row = connection.execute(sa.select(table).where(mine)).mappings().first()
    return None if row is None else _rows.to_annotator(row)


def known_annotator(connection: Connection, name: str) -> Annotator:
    """Raises Refused("unknown_annotator")."""
    row = connection.execute(_PERSON, {"name": name}).mappings().first()
    if row is None:
        raise Refused("unknown_annotator", "this person has not joined")
    return _rows.to_annotator(row)


def change_status(
    connection: Connection, found: Annotator, status: Status, why: str, now: float
) -> None:
    """Logs a person's new status, and gives back or takes again the places that they hold."""
    row = {
        "seq": next_number(connection),
        "annotator": found.id,
        "status": status,
        "why": why,
        "at": now,
    }
    connection.execute(sa.insert(schema.standing).values(row))
    table = schema.annotator
    connection.execute(sa.update(table).where(table.c.id == found.id).values(status=status))

    ballot = schema.ballot
    held = sa.select(ballot.c.item).where(
        ballot.c.annotator == found.id, ballot.c.state.in_(HOLDING)
    )
    by = (status == "active") - (found.status == "active")
    if by:
        change_held(connection, connection.execute(held).scalars().all(), by)


def blank(connection: Connection, annotator: str) -> int:
    """Blanks what a person has said and who they are; returns how many votes."""
    # votes keep their number and their ballot
    vote = schema.vote
    ballot = schema.ballot
    theirs = sa.select(ballot.c.id).where(ballot.c.annotator == annotator)
    numbers = connection.execute(sa.select(vote.c.seq).where(vote.c.ballot.in_(theirs))).scalars()
    seqs = numbers.all()
    empty = {"choice": "deleted", "ranking": [], "reasons": [], "points": [], "device": {}}
    times = {"visible_ms": 0.0, "decide_ms": 0.0, "at": 0.0}
    for seq in seqs:
        connection.execute(
            sa.update(vote).where(vote.c.seq == seq).values({**empty, **times, "nonce": str(seq)})
        )

    # their ballots, prompts and name
    answered = ballot.c.state != "expired"
    connection.execute(
        sa.update(ballot).where(ballot.c.annotator == annotator, answered).values(state="deleted")
    )
    prompt = schema.prompt
    connection.execute(sa.update(prompt).where(prompt.c.annotator == annotator).values(text=""))
    table = schema.annotator
    nobody = {"name": "", "consent": "", "token_digest": f"deleted {annotator}"}
    connection.execute(sa.update(table).where(table.c.id == annotator).values(nobody))
    return len(seqs)


# --- votes ---------------------------------------------------------------------------------------


def ballot_row(connection: Connection, name: str) -> Row | None:
    rows = connection.execute(_ONE_BALLOT, {"name": name})
    return rows.mappings().first()


def set_ballot(connection: Connection, name: str, **values: Any) -> None:
    table = schema.ballot
    connection.execute(sa.update(table).where(table.c.id == name).values(values))


def renew(connection: Connection, ballot: Ballot, expires: float) -> Ballot:
    """The ballot with a later end; an earlier one is kept out."""
    if expires <= ballot.expires:
        return ballot
    set_ballot(connection, ballot.id, expires=expires)
    return replace(ballot, expires=expires)


def recorded_vote(connection: Connection, ballot: str, nonce: str) -> int | None:
    """The vote that stands for a ballot, else the one of this nonce that was undone."""
    row = connection.execute(_RECORDED, {"name": ballot, "click": nonce}).first()
    return None if row is None else row.seq


def record(connection: Connection, row: Row, answer: Answer, now: float) -> int:
    """Logs an answer to an open ballot; a skip gives the place back."""
    vote = schema.vote
    ballot = row["ballot_id"]
    before = sa.select(sa.func.count()).where(vote.c.ballot == ballot)
    seq = next_number(connection)
    connection.execute(
        sa.insert(vote).values(
            {
                **_rows.of_answer(answer),
                "seq": seq,
                "ballot": ballot,
                "attempt": connection.execute(before).scalar_one(),
                "at": now,
            }
        )
    )
    skips = answer.choice == "skip"
    set_ballot(connection, ballot, state="skipped" if skips else "voted")
    if skips and known_annotator(connection, row["ballot_annotator"]).status == "active":
        change_held(connection, [row["item_id"]], -1)
    return seq


def last_vote(connection: Connection, campaign: str, annotator: str) -> Row | None:
    """A person's newest vote that stands, with its ballot."""
    vote = schema.vote
    undo = schema.undo
    ballot = schema.ballot
    rows = connection.execute(
        sa.select(vote.c.seq, schema.item.c.held, *_BALLOT)
        .select_from(_OF_VOTE.outerjoin(undo, undo.c.vote == vote.c.seq))
        .where(
            ballot.c.annotator == annotator,
            ballot.c.campaign == campaign,
            ballot.c.state.in_(("voted", "skipped")),
            undo.c.seq.is_(None),
        )
        .order_by(vote.c.seq.desc())
        .limit(1)
    )
    return rows.mappings().first()


def undone_ballot(connection: Connection, annotator: str, nonce: str) -> Ballot | None:
    """The ballot that the undo of this nonce has opened."""
    undo = schema.undo
    joined = _OF_VOTE.join(undo, undo.c.vote == schema.vote.c.seq)
    rows = connection.execute(
        sa.select(*_BALLOT)
        .select_from(joined)
        .where(undo.c.annotator == annotator, undo.c.nonce == nonce)
    )
    row = rows.mappings().first()
    return None if row is None else _rows.to_ballot(row)


def take_back(connection: Connection, row: Row, nonce: str, now: float) -> None:
    """Logs the undo of a vote (``last_vote``) and opens its ballot. Raises Refused("full") where
    that was a skip and its place is taken."""
    if row["ballot_state"] == "skipped":
        active = known_annotator(connection, row["ballot_annotator"]).status == "active"
        if active and 0 < row["item_target"] <= row["held"]:
            raise Refused("full", "others have voted on these pictures meanwhile")
        if active:
            change_held(connection, [row["item_id"]], 1)
    values = {
        "seq": next_number(connection),
        "vote": row["seq"],
        "annotator": row["ballot_annotator"],
        "nonce": nonce,
        "at": now,
    }
    connection.execute(sa.insert(schema.undo).values(values))
    set_ballot(connection, row["ballot_id"], state="open")


def effective(campaign: str, after: int, upto: int) -> sa.Select[Any]:
    """The next ``PAGE`` votes of a campaign, with their ballots, that no undo up to ``upto`` took
    back."""
    vote = schema.vote
    undo = schema.undo
    taken = sa.and_(undo.c.vote == vote.c.seq, undo.c.seq <= upto)
    return (
        sa.select(vote, *_BALLOT)
        .select_from(_OF_VOTE.outerjoin(undo, taken))
        .where(
            schema.ballot.c.campaign == campaign,
            vote.c.seq > after,
            vote.c.seq <= upto,
            vote.c.choice != "deleted",
            undo.c.seq.is_(None),
        )
        .order_by(vote.c.seq)
        .limit(PAGE)
    )
