"""Rows of the tables as records, and records as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from rlalign.ballots import schema
from rlalign.ballots.records import Annotator, Answer, Ballot, Item, Picture, Ranking, Vote

Row = Mapping[Any, Any]
"""A row by the names of its columns."""

BALLOT_COLUMNS: tuple[sa.ColumnElement[Any], ...] = (
    *(column.label(f"item_{column.name}") for column in schema.item.c),
    *(column.label(f"ballot_{column.name}") for column in schema.ballot.c),
)
"""A ballot with its item, for ``to_ballot``."""

OF_ITEM = schema.ballot.join(schema.item, schema.ballot.c.item == schema.item.c.id)


def to_item(row: Row, prefix: str = "") -> Item:
    names = ("id", "campaign", "caption", "kind", "truth", "of_ballot", "annotator")
    texts = {name: row[prefix + name] for name in names}
    return Item(
        **texts,
        uids=tuple(row[prefix + "uids"]),
        rule=row[prefix + "rule"],
        propensity=row[prefix + "propensity"],
        target=row[prefix + "target"],
    )


def of_item(item: Item, number: int) -> dict[str, Any]:
    names = ("id", "campaign", "caption", "kind", "truth", "of_ballot", "annotator", "rule")
    return {
        **{name: getattr(item, name) for name in names},
        "number": number,
        "uids": list(item.uids),
        "propensity": float(item.propensity),
        "target": int(item.target),
        "held": 0,
        "withdrawn": False,
    }


def to_ballot(row: Row) -> Ballot:
    return Ballot(
        id=row["ballot_id"],
        annotator=row["ballot_annotator"],
        number=row["ballot_number"],
        item=to_item(row, "item_"),
        order=tuple(row["ballot_order"]),
        rule=row["ballot_rule"],
        propensity=row["ballot_propensity"],
        issued=row["ballot_issued"],
        expires=row["ballot_expires"],
    )


def of_ballot(ballot: Ballot) -> dict[str, Any]:
    names = ("id", "campaign", "annotator", "number", "rule", "propensity", "issued", "expires")
    return {
        **{name: getattr(ballot, name) for name in names},
        "item": ballot.item.id,
        "order": list(ballot.order),
        "state": "open",
    }


def to_vote(row: Row, ballot: Ballot) -> Vote:
    ranking: Ranking = tuple(tuple(group) for group in row["ranking"])
    answer = Answer(
        nonce=row["nonce"],
        choice=row["choice"],
        ranking=ranking,
        reasons=tuple(row["reasons"]),
        points=tuple((int(place), float(x), float(y)) for place, x, y in row["points"]),
        visible_ms=row["visible_ms"],
        decide_ms=row["decide_ms"],
        device=row["device"],
    )
    return Vote(seq=row["seq"], ballot=ballot, answer=answer, at=row["at"])


def of_answer(answer: Answer) -> dict[str, Any]:
    return {
        "nonce": answer.nonce,
        "choice": answer.choice,
        "ranking": [list(group) for group in answer.ranking],
        "reasons": list(answer.reasons),
        "points": [list(point) for point in answer.points],
        "visible_ms": float(answer.visible_ms),
        "decide_ms": float(answer.decide_ms),
        "device": dict(answer.device),
    }


def to_picture(row: Row) -> Picture:
    names = ("uid", "caption", "policy", "seed", "plan", "frames", "media_type", "rate")
    return Picture(**{name: row[name] for name in names})


def of_picture(picture: Picture) -> dict[str, Any]:
    names = ("uid", "caption", "policy", "seed", "frames", "media_type", "rate")
    return {**{name: getattr(picture, name) for name in names}, "plan": dict(picture.plan)}


def to_annotator(row: Row) -> Annotator:
    names = ("id", "name", "consent", "status", "joined")
    return Annotator(**{name: row[name] for name in names})
