"""Votes made without a store."""

from __future__ import annotations

from rlalign.ballots.records import Answer, Ballot, Item, Kind, Vote


def made_vote(
    seq: int,
    person: str,
    choice: str,
    *,
    uids: tuple[str, ...] = ("a", "b"),
    caption: str = "",
    kind: Kind = "live",
    truth: str = "",
    of: str = "",
    order: tuple[int, ...] = (0, 1),
    ms: float = 500.0,
) -> Vote:
    """A vote with a ballot of its own, named by its number."""
    item = Item(
        id=f"i{seq}",
        campaign="c",
        caption=caption or f"caption {seq}",
        uids=uids,
        kind=kind,
        truth=truth,
        of_ballot=of,
    )
    ballot = Ballot(
        id=f"b{seq}",
        annotator=person,
        number=seq,
        item=item,
        order=order,
        rule="random",
        propensity=1.0,
        issued=0.0,
        expires=1.0,
    )
    answer = Answer(nonce="n", choice=choice, decide_ms=ms)  # type: ignore[arg-type]
    return Vote(seq=seq, ballot=ballot, answer=answer, at=3600.0 * seq)
