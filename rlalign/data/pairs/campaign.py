"""The pairs of a campaign that a run learns from, without their pictures; ``votes.py`` says which
votes count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.core.registry import UserError
from rlalign.data.pairs.settings import BallotSettings

if TYPE_CHECKING:
    from rlalign.ballots.records import Vote
    from rlalign.ballots.store import Store
    from rlalign.data.pairs.votes import Filters


@dataclass(frozen=True, kw_only=True)
class VotePair:
    """Two pictures of one vote; the first stood left."""

    seq: int
    """The vote's number in the log."""
    caption: str
    uid_0: str
    uid_1: str
    label_0: float
    """1 where picture 0 was preferred, 0 where picture 1 was, 0.5 for a tie."""


def read_vote_pairs(
    store: Store, campaign: str, settings: BallotSettings, upto: int
) -> list[VotePair]:
    """The pairs of a campaign's votes that stood and counted when the log had ``upto`` rows, in the
    order of the log.

    The same cursor gives the same pairs for ever, unless somebody has theirs deleted.
    """
    from rlalign.data.pairs.votes import select_votes

    chosen = select_votes(store, campaign, filters_of(settings), upto)
    return [pair for vote in chosen.votes for pair in pairs_of_vote(vote)]


def filters_of(settings: BallotSettings) -> Filters:
    """Which votes count."""
    from rlalign.ballots.quality import Rules
    from rlalign.data.pairs.votes import Filters

    rules = Rules(min_gold=settings.min_gold, min_repeats=settings.min_repeats)
    return Filters(people=rules, min_ms=settings.min_ms)


def pairs_of_vote(vote: Vote) -> Iterator[VotePair]:
    """Every pair of pictures that a vote compares."""
    from rlalign.data.pairs.votes import LABELS

    for left, right, outcome in vote.pairs:
        yield VotePair(
            seq=vote.seq,
            caption=vote.ballot.item.caption,
            uid_0=left,
            uid_1=right,
            label_0=LABELS[outcome],
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


def write_vote_pairs(settings: BallotSettings, file: Path, upto: int | None = None) -> int:
    """Writes the pairs of the votes up to a row of the log (None: of all that there are now) as one
    Parquet file; returns the row.

    Raises UserError where there is none.
    """
    from rlalign.ballots.store import Store
    from rlalign.data.pairs.votes import export_votes

    with contextlib.closing(Store.open(settings.store)) as store:
        campaign = one_campaign(store, settings.campaign)
        if not campaign:
            raise UserError(
                "preferences.ballots must have votes, and has none yet; let people vote (rlalign"
                " vote)"
            )
        cursor = store.cursor() if upto is None else upto
        export_votes(store, campaign, file, filters_of(settings), cursor)
    return cursor
