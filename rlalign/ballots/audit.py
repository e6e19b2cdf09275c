"""Compares what a store keeps at hand (held places, states of ballots) with what its log says."""

from __future__ import annotations

from collections import Counter, defaultdict

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from rlalign.ballots import schema
from rlalign.ballots._dealing import HOLDING
from rlalign.ballots.store import Store


def audit(store: Store, campaign: str) -> list[str]:
    """Every contradiction within a campaign, in words; none in a store that is whole."""
    with store.reading() as connection:
        return [
            *_places(connection, campaign),
            *_states(connection, campaign),
            *_numbers(connection),
        ]


def _places(connection: Connection, campaign: str) -> list[str]:
    """Items whose held places are not those of their ballots."""
    ballot = schema.ballot
    item = schema.item
    annotator = schema.annotator
    holding = connection.execute(
        sa.select(ballot.c.item)
        .join(annotator, annotator.c.id == ballot.c.annotator)
        .where(ballot.c.state.in_(HOLDING), annotator.c.status == "active")
        .where(ballot.c.campaign == campaign)
    )
    counted = Counter(holding.scalars())
    rows = connection.execute(sa.select(item.c.id, item.c.held).where(item.c.campaign == campaign))
    return [
        f"item {row.id} holds {row.held} places and has {counted[row.id]} ballots"
        for row in rows
        if row.held != counted[row.id]
    ]


def _states(connection: Connection, campaign: str) -> list[str]:
    """Ballots with two votes that stand, or with a state that their votes contradict."""
    # the votes that stand, by ballot
    ballot = schema.ballot
    vote = schema.vote
    undo = schema.undo
    standing: dict[str, list[str]] = defaultdict(list)
    rows = connection.execute(
        sa.select(vote.c.ballot, vote.c.choice)
        .join(ballot, ballot.c.id == vote.c.ballot)
        .outerjoin(undo, undo.c.vote == vote.c.seq)
        .where(undo.c.seq.is_(None), ballot.c.campaign == campaign)
    )
    for row in rows:
        standing[row.ballot].append(row.choice)

    # each ballot's state
    found = []
    states = connection.execute(
        sa.select(ballot.c.id, ballot.c.state).where(ballot.c.campaign == campaign)
    )
    for row in states:
        choices = standing[row.id]
        if len(choices) > 1:
            found.append(f"ballot {row.id} has {len(choices)} votes")
        elif row.state != "deleted" and _implied(choices) not in (row.state, ""):
            found.append(f"ballot {row.id} is {row.state}, and its votes are {choices}")
        elif not choices and row.state in ("voted", "skipped"):
            found.append(f"ballot {row.id} is {row.state} and has no vote")
    return found


def _implied(choices: list[str]) -> str:
    if not choices:
        return ""
    return "skipped" if choices == ["skip"] else "voted"


def _numbers(connection: Connection) -> list[str]:
    """Numbers of the log that are there twice, or missing: each row has its own, from 1 on."""
    tables = (schema.vote, schema.undo, schema.standing, schema.prompt)
    numbers: list[int] = []
    for table in tables:
        numbers += connection.execute(sa.select(table.c.seq)).scalars()
    numbers.sort()
    last = connection.execute(sa.select(schema.counter.c.value)).scalar_one()
    if numbers != list(range(1, last + 1)):
        return [f"the log's rows must be numbered 1 to {last}, each once; {len(numbers)} are"]
    return []
