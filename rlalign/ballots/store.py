"""The store of votes: a file (SQLite) or a PostgreSQL database, with the same verbs.

Every verb is one transaction, and writers follow one another (``connect.py``); a vote is on the
disk when ``vote`` returns. All times are the caller's. A store may be used by several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from rlalign.ballots import _dealing, _log, _rows, schema
from rlalign.ballots._dealing import Dealer
from rlalign.ballots.connect import connect, lock
from rlalign.ballots.records import (
    Annotator,
    Answer,
    Ballot,
    Campaign,
    Item,
    Picture,
    Refused,
    Status,
    Stock,
    Vote,
    check_answer,
)
from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError

KEEP_S = 900.0
"""Seconds that a ballot waits for its answer; showing it again starts them anew."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of a vote."""

    outcome: Literal["recorded", "again"]
    """``again``: this click, or another answer to this ballot, was recorded before."""
    seq: int
    """Of the vote that stands in the log."""


class Store:
    """People's choices, and what they are asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()

    @classmethod
    def open(cls, place: str | Path) -> Store:
        """Opens a path or a URL, and creates or migrates the tables. Raises UserError."""
        return cls(connect(place))

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction while which no other one writes."""
        with (
            self._turn,
            self._engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            lock(connection)
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads, for what this room computes."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    # --- what can be asked ------------------------------------------------------------------------

    def create_campaign(self, campaign: Campaign) -> Campaign:
        """Adds a campaign, or returns the one of this id. Raises UserError where its mode is
        another."""
        with self._writing() as connection:
            found = _log.find_campaign(connection, campaign.id)
            if found is None:
                row = {
                    "id": campaign.id,
                    "mode": campaign.mode,
                    "settings": dict(campaign.settings),
                    "created": campaign.created,
                }
                connection.execute(sa.insert(schema.campaign).values(row))
                return campaign
        if found.mode != campaign.mode:
            raise UserError(
                f"campaign {campaign.id!r} is there with mode {found.mode}, got {campaign.mode};"
                " name another campaign"
            )
        return found

    def campaign(self, name: str) -> Campaign | None:
        with self.reading() as connection:
            return _log.find_campaign(connection, name)

    def campaigns(self) -> list[Campaign]:
        """All of them, the oldest first."""
        table = schema.campaign
        with self.reading() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.created, table.c.id))
            return [Campaign(**row) for row in rows.mappings()]

    def add_picture(self, picture: Picture, content: bytes) -> None:
        """Keeps a picture; one that is there already stays as it is."""
        known = sa.select(schema.picture.c.uid).where(schema.picture.c.uid == picture.uid)
        with self._writing() as connection:
            if connection.execute(known).first() is None:
                connection.execute(sa.insert(schema.picture).values(_rows.of_picture(picture)))
                connection.execute(sa.insert(schema.content).values(uid=picture.uid, bytes=content))

    def picture(self, uid: str) -> Picture | None:
        table = schema.picture
        with self.reading() as connection:
            row = connection.execute(sa.select(table).where(table.c.uid == uid)).mappings().first()
            return None if row is None else _rows.to_picture(row)

    def content(self, uid: str) -> bytes | None:
        """The bytes of a picture."""
        table = schema.content
        with self.reading() as connection:
            found = connection.execute(sa.select(table.c.bytes).where(table.c.uid == uid)).scalar()
            return None if found is None else bytes(found)

    def prompt_of(self, item: Item) -> str:
        """An item's caption with its record, where its pictures say one."""
        shown = [self.picture(uid) for uid in item.uids]
        prompts = [one.prompt for one in shown if one is not None and one.caption == item.caption]
        return next((prompt for prompt in prompts if record_of(prompt)), item.caption)

    def add_items(self, items: Iterable[Item]) -> int:
        """Adds what can be asked, and returns how many were new; an id that is there is skipped."""
        with self._writing() as connection:
            return _dealing.add_items(connection, items)

    def withdraw_items(self, ids: Iterable[str]) -> None:
        """Takes items out of what is dealt; their votes stay."""
        with self._writing() as connection:
            for one in ids:
                item = schema.item
                connection.execute(sa.update(item).where(item.c.id == one).values(withdrawn=True))

    def items(self, campaign: str) -> list[Item]:
        """Everything that was ever to be asked, in the order in which it was added."""
        item = schema.item
        rows = sa.select(item).where(item.c.campaign == campaign).order_by(item.c.number)
        with self.reading() as connection:
            return [_rows.to_item(row) for row in connection.execute(rows).mappings()]

    def stock(self, campaign: str, now: float) -> Stock:
        """How much is left to ask, for the queue that makes more."""
        item = schema.item
        ballot = schema.ballot
        waits = sa.or_(item.c.target == 0, item.c.held < item.c.target)
        by_kind = (
            sa.select(item.c.kind, sa.func.count().label("amount"))
            .where(item.c.campaign == campaign, item.c.withdrawn.is_(False), waits)
            .group_by(item.c.kind)
        )
        by_state = (
            sa.select(ballot.c.state, sa.func.count().label("amount"))
            .where(
                ballot.c.campaign == campaign,
                sa.or_(ballot.c.state == "voted", ballot.c.expires > now),
            )
            .group_by(ballot.c.state)
        )
        with self.reading() as connection:
            items = {row.kind: row.amount for row in connection.execute(by_kind)}
            states = {row.state: row.amount for row in connection.execute(by_state)}
        return Stock(items=items, votes=states.get("voted", 0), open=states.get("open", 0))

    # --- people -----------------------------------------------------------------------------------

    def join(self, name: str, token: str, consent: str, now: float) -> Annotator:
        """The person who knows the token, added where nobody does; only its digest is kept."""
        with self._writing() as connection:
            found = _log.annotator_of(connection, token)
            if found is None:
                found = _log.add_annotator(connection, name, token, consent, now)
            return found

    def annotator_of(self, token: str) -> Annotator | None:
        with self.reading() as connection:
            return _log.annotator_of(connection, token)

    def annotators(self) -> list[Annotator]:
        """Everybody, in the order of joining."""
        table = schema.annotator
        with self.reading() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.joined, table.c.id))
            return [_rows.to_annotator(row) for row in rows.mappings()]

    def annotator(self, name: str) -> Annotator | None:
        """The person of an id."""
        table = schema.annotator
        with self.reading() as connection:
            rows = connection.execute(sa.select(table).where(table.c.id == name)).mappings()
            row = rows.first()
            return None if row is None else _rows.to_annotator(row)

    def given(self, campaign: str, annotator: str) -> int:
        """A person's votes that stand, skips left out."""
        ballot = schema.ballot
        mine = sa.and_(ballot.c.campaign == campaign, ballot.c.annotator == annotator)
        count = sa.select(sa.func.count()).where(mine, ballot.c.state == "voted")
        with self.reading() as connection:
            return connection.execute(count).scalar_one()

    def set_status(self, annotator: str, status: Status, why: str, now: float) -> None:
        """Leaves a person out, or takes them in again. Their votes stay in the log; the places that
        these hold are free for others while they are left out."""
        assert status != "deleted", "delete_votes_of deletes"
        with self._writing() as connection:
            found = _log.known_annotator(connection, annotator)
            if found.status == "deleted":
                raise Refused("deleted", "this person's votes were deleted on request")
            if found.status != status:
                _log.change_status(connection, found, status, why, now)

    def delete_votes_of(self, annotator: str, now: float) -> int:
        """Blanks a person's votes, prompts, name and token, on request; returns how many votes.

        Rows stay as tombstones with their numbers, so that cursors go on meaning the same places.
        """
        with self._writing() as connection:
            found = _log.known_annotator(connection, annotator)
            if found.status == "deleted":
                return 0
            _log.change_status(connection, found, "deleted", "", now)
            return _log.blank(connection, annotator)

    def standings(self, upto: int) -> Mapping[str, Status]:
        """The status of each person as of a cursor, for those for whom it was ever changed."""
        table = schema.standing
        with self.reading() as connection:
            rows = connection.execute(
                sa.select(table.c.annotator, table.c.status)
                .where(table.c.seq <= upto)
                .order_by(table.c.seq)
            )
            return {row.annotator: row.status for row in rows}

    # --- ballots and votes ------------------------------------------------------------------------

    def issue(
        self,
        campaign: str,
        annotator: str,
        now: float,
        dealer: Dealer,
        *,
        keep_s: float = KEEP_S,
        ahead: int = 0,
    ) -> Ballot | None:
        """The ballot that a person has open (a reload, a second tab), else a new one.

        ``ahead`` 1 is the ballot after it, so that its pictures can be fetched before they are
        needed. None where nothing is left to ask this person. Raises Refused for somebody who is
        left out or unknown.
        """
        with self._writing() as connection:
            found = _log.known_annotator(connection, annotator)
            if found.status != "active":
                raise Refused("left_out", "this person does not take part any more")
            _dealing.expire(connection, campaign, now)
            ballots = _dealing.open_ballots(connection, campaign, annotator)
            until = (now, now + keep_s)
            while len(ballots) <= ahead:
                ballot = _dealing.deal(connection, campaign, annotator, dealer, until)
                if ballot is None:
                    break
                ballots.append(ballot)
            if ahead >= len(ballots):
                return None
            return _log.renew(connection, ballots[ahead], now + keep_s)

    def vote(self, annotator: str, ballot: str, answer: Answer, now: float) -> Receipt:
        """Records an answer; the same click again, or another answer to the same ballot, changes
        nothing and says which vote stands.

        Raises Refused: unknown_ballot, not_yours, expired, bad_choice.
        """
        with self._writing() as connection:
            row = _log.ballot_row(connection, ballot)
            if row is None:
                raise Refused("unknown_ballot", f"there is no ballot {ballot!r}")
            if row["ballot_annotator"] != annotator:
                raise Refused("not_yours", "this ballot was given to somebody else")
            known = _log.recorded_vote(connection, ballot, answer.nonce)
            if known is not None:
                return Receipt(outcome="again", seq=known)
            if row["ballot_state"] != "open" or row["ballot_expires"] <= now:
                raise Refused("expired", "this ballot has waited too long; here is the next one")
            found = _log.find_campaign(connection, row["ballot_campaign"])
            assert found is not None, "a ballot has a campaign"
            check_answer(_rows.to_ballot(row), answer, found.mode)
            seq = _log.record(connection, row, answer, now)
            return Receipt(outcome="recorded", seq=seq)

    def undo(
        self, campaign: str, annotator: str, nonce: str, now: float, *, keep_s: float = KEEP_S
    ) -> Ballot | None:
        """Takes the person's last vote back: its ballot is open again and comes next.

        The undo is a row of the log; the same nonce again changes nothing and returns that ballot.
        None where there is no vote to take back. Raises Refused("full") where a skip cannot be
        taken back since others have taken the place.
        """
        with self._writing() as connection:
            before = _log.undone_ballot(connection, annotator, nonce)
            if before is not None:
                return before
            found = _log.last_vote(connection, campaign, annotator)
            if found is None:
                return None
            _log.take_back(connection, found, nonce, now)
            return _log.renew(connection, _rows.to_ballot(found), now + keep_s)

    def withdraw_own(self, campaign: str, annotator: str, keep: str = "") -> None:
        """Takes back what was put together for one person alone and is not answered, dealt or not:
        a chain's pair once the choice that led to it is undone. The item ``keep`` stays."""
        with self._writing() as connection:
            if _log.known_annotator(connection, annotator).status == "active":
                _dealing.withdraw_own(connection, campaign, annotator, keep)

    def ballot(self, name: str) -> Ballot | None:
        with self.reading() as connection:
            row = _log.ballot_row(connection, name)
            return None if row is None else _rows.to_ballot(row)

    # --- reading the log --------------------------------------------------------------------------

    def cursor(self) -> int:
        """The number of the newest row of the log; 0 where there is none."""
        with self.reading() as connection:
            return connection.execute(_log.LAST).scalar_one()

    def votes(self, campaign: str, after: int = 0, upto: int | None = None) -> Iterator[Vote]:
        """The votes with ``after < seq <= upto`` that stood when the log had ``upto`` rows, in
        their order; ``upto`` is the newest row where it is not given.

        The same cursor gives the same votes for ever, unless somebody has theirs deleted. Votes of
        people who are left out are among them (``standings``).
        """
        end = self.cursor() if upto is None else upto
        while True:
            with self.reading() as connection:
                rows = connection.execute(_log.effective(campaign, after, end)).mappings().all()
            for row in rows:
                yield _rows.to_vote(row, _rows.to_ballot(row))
            if len(rows) < _log.PAGE:
                return
            after = rows[-1]["seq"]

    # --- prompts that people type -----------------------------------------------------------------

    def add_prompt(self, campaign: str, annotator: str, text: str, now: float) -> int:
        """Keeps a prompt as it was typed, and returns its number in the log."""
        with self._writing() as connection:
            row = {
                "seq": _log.next_number(connection),
                "campaign": campaign,
                "annotator": annotator,
            }
            connection.execute(sa.insert(schema.prompt).values({**row, "text": text, "at": now}))
            return row["seq"]

    def prompts(self, campaign: str, annotator: str = "") -> list[tuple[int, str]]:
        """(number, text) of the prompts that were typed, by everybody or by one person."""
        table = schema.prompt
        mine = table.c.annotator == annotator if annotator else sa.true()
        with self.reading() as connection:
            rows = connection.execute(
                sa.select(table.c.seq, table.c.text)
                .where(table.c.campaign == campaign, table.c.text != "", mine)
                .order_by(table.c.seq)
            )
            return [(row.seq, row.text) for row in rows]
