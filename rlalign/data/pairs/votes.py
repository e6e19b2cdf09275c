"""People's votes as preference pairs: which votes count, and the pairs that each of them makes.

A vote between two pictures is one pair; a ranking gives every pair of its pictures. A tie is half a
win for both, and so is "both bad", as in Pick-a-Pic. Gold pairs and repeats measure people and are
learned from by nobody; a skip says nothing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.core.files import write_whole
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.settings import BallotSettings

if TYPE_CHECKING:
    from rlalign.ballots.records import Vote
    from rlalign.ballots.store import Store

LEARNED = ("live", "shared")
"""Kinds of items whose votes are learned from."""


@dataclass(frozen=True, kw_only=True)
class VotedPair:
    """Two pictures of one vote, in the order in which the store names them, which no choice has
    had a say in."""

    seq: int
    """The vote's number in the log."""
    caption: str
    uid_0: str
    uid_1: str
    label_0: float
    """1 where picture 0 was preferred, 0 where picture 1 was, 0.5 for a tie."""
    vote: Vote


def read_voted(store: Store, campaign: str, settings: BallotSettings, upto: int) -> list[VotedPair]:
    """The pairs of a campaign's votes that stood and counted when the log had ``upto`` rows, in the
    order of the log.

    The same cursor gives the same pairs for ever, unless somebody has theirs deleted.
    """
    votes = list(store.votes(campaign, 0, upto))
    out = people_left_out(store, votes, settings, upto)
    found: list[VotedPair] = []
    for vote in votes:
        counts = vote.ballot.item.kind in LEARNED and vote.ballot.annotator not in out
        if counts and vote.answer.decide_ms >= settings.min_ms:
            found.extend(pairs_of_vote(vote))
    return found


def people_left_out(
    store: Store, votes: Sequence[Vote], settings: BallotSettings, upto: int
) -> set[str]:
    """People whose votes do not count as of a cursor: those who were left out, and those whom the
    rules leave out."""
    from rlalign.ballots.quality import Rules, left_out

    out = {who for who, status in store.standings(upto).items() if status != "active"}
    rules = Rules(min_gold=settings.min_gold, min_repeats=settings.min_repeats)
    return out | left_out(votes, rules).keys()


def pairs_of_vote(vote: Vote) -> Iterator[VotedPair]:
    """Every pair of pictures that a vote compares."""
    place = {uid: number for number, group in enumerate(vote.groups) for uid in group}
    uids = [uid for uid in vote.ballot.item.uids if uid in place]
    for uid_0, uid_1 in combinations(uids, 2):
        better = place[uid_1] - place[uid_0]
        yield VotedPair(
            seq=vote.seq,
            caption=vote.ballot.item.caption,
            uid_0=uid_0,
            uid_1=uid_1,
            label_0=0.5 if better == 0 else float(better > 0),
            vote=vote,
        )


def one_campaign(store: Store, name: str) -> str:
    """The campaign of this name, or the only one of the store; "" where there is none yet.

    Raises UserError where several are there and none is named, or where others are there and the
    named one is not.
    """
    there = [campaign.id for campaign in store.campaigns()]
    if name in there or not there:
        return name if name in there else ""
    if name:
        raise UserError(
            f"campaign must be one of {', '.join(there)}, which the store of votes has, got"
            f" {name!r}"
        )
    if len(there) > 1:
        raise UserError(
            f"campaign must name one of {', '.join(there)}: the store has votes of each of them"
        )
    return there[0]


def row_of(store: Store, pair: VotedPair, of_prompt: int) -> dict[str, Any]:
    """A pair as a row for ``rlalign.data.pairs.columns.write_pairs``; ``of_prompt`` pairs have its
    prompt. People are there by their pseudonymous ids."""
    vote = pair.vote
    best = ""
    if pair.label_0 != 0.5:
        best = pair.uid_0 if pair.label_0 == 1.0 else pair.uid_1
    pictures = [store.picture(uid) for uid in (pair.uid_0, pair.uid_1)]
    return {
        "caption": pair.caption,
        "jpg_0": store.content(pair.uid_0) or b"",
        "jpg_1": store.content(pair.uid_1) or b"",
        "label_0": pair.label_0,
        "label_1": 1.0 - pair.label_0,
        "are_different": pair.uid_0 != pair.uid_1,
        "has_label": True,
        "best_image_uid": best,
        "image_0_uid": pair.uid_0,
        "image_1_uid": pair.uid_1,
        "model_0": pictures[0].policy if pictures[0] else "",
        "model_1": pictures[1].policy if pictures[1] else "",
        "ranking_id": vote.seq,
        "image_0_url": "",
        "image_1_url": "",
        "num_example_per_prompt": of_prompt,
        "user_id": vote.ballot.annotator,
        "created_at": datetime.fromtimestamp(vote.at, UTC).replace(tzinfo=None),
        "choice": vote.answer.choice,
        "decide_ms": vote.answer.decide_ms,
        "kind": vote.ballot.item.kind,
        "left": int(vote.ballot.shown.index(pair.uid_1) < vote.ballot.shown.index(pair.uid_0)),
        "propensity": vote.ballot.propensity,
        "reasons": list(vote.answer.reasons),
        "rule": vote.ballot.rule,
    }


def write_voted(settings: BallotSettings, file: Path) -> int:
    """Writes the pairs of all votes that there are now as one Parquet file; returns the cursor.

    Raises UserError where there is none.
    """
    from rlalign.ballots.store import Store

    with contextlib.closing(Store.open(settings.store)) as store:
        cursor = store.cursor()
        export(store, settings, file, cursor)
    return cursor


def export(store: Store, settings: BallotSettings, file: Path, upto: int | None = None) -> int:
    """Writes the pairs of the votes up to a cursor as one Parquet file; returns how many pairs.

    Raises UserError where there is none.
    """
    campaign = one_campaign(store, settings.campaign)
    cursor = store.cursor() if upto is None else upto
    pairs = read_voted(store, campaign, settings, cursor) if campaign else []
    if not pairs:
        raise UserError(
            "a store of votes must have some that count, and this one has none yet; let people vote"
            " (rlalign vote)"
        )
    count = Counter(pair.caption for pair in pairs)
    written = write_pairs(file, (row_of(store, pair, count[pair.caption]) for pair in pairs))
    card = describe_export(store, settings, pairs, (campaign, cursor))
    write_whole(file.with_suffix(".md"), card)
    return written


def describe_export(
    store: Store, settings: BallotSettings, pairs: Sequence[VotedPair], place: tuple[str, int]
) -> str:
    """The card beside an export: of what votes it is made, and which were left out."""
    campaign, cursor = place
    votes = list(store.votes(campaign, 0, cursor))
    out = people_left_out(store, votes, settings, cursor)
    learned = [vote for vote in votes if vote.ballot.item.kind in LEARNED]
    labels = Counter(pair.label_0 for pair in pairs)
    rows = {
        "campaign": campaign,
        "rows of the log": cursor,
        "votes that stood": len(votes),
        "of gold pairs and repeats, left out": len(votes) - len(learned),
        "skips, left out": sum(not vote.groups for vote in learned),
        "people": len({vote.ballot.annotator for vote in votes}),
        "people left out": len(out),
        "votes of less milliseconds left out": settings.min_ms,
        "least share of gold pairs": settings.min_gold,
        "least share of repeats alike": settings.min_repeats,
        "pairs": len(pairs),
        "ties (label 0.5, both bad among them)": labels[0.5],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    head = ["# Votes as preference pairs", "", "Columns of Pick-a-Pic v2, and of rlalign.", ""]
    return "\n".join([*head, "| | |", "|---|---|", *lines, ""])
