"""Stores of votes for tests: pictures of one colour, people, and what they choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer, Ballot, Campaign, Item, Picture, picture_uid
from rlalign.ballots.store import Store
from rlalign.data.pairs.ranking import encode

ONE_AFTER_ANOTHER = Deal(gold=0.0, repeat=0.0, shared=0.0)


def png(value: int, side: int | tuple[int, int] = 8) -> bytes:
    """A grey picture that says its number; ``side`` may be (height, width)."""
    height, width = side if isinstance(side, tuple) else (side, side)
    return encode(np.full((3, height, width), value, dtype=np.uint8))


class Voted:
    """A store with a campaign ``shapes``, and its people."""

    def __init__(self, place: Path | str, campaign: str = "shapes", side: int = 8) -> None:
        self.store = Store.open(place)
        self.campaign = campaign
        self.side: int | tuple[int, int] = side
        """Of pictures that are added and chosen from now on."""
        self.store.create_campaign(Campaign(id=campaign, mode="pairs"))
        self.now = 1000.0
        self._items = 0

    def person(self, name: str = "anna") -> str:
        """Their id."""
        return self.store.join(name, f"token of {name}", "", self.now).id

    def add(self, caption: str, values: Sequence[int], **changes: object) -> Item:
        """An item of pictures with these numbers."""
        uids = []
        for value in values:
            content = png(value, self.side)
            picture = Picture(uid=picture_uid(content), caption=caption, policy=f"p{value}")
            self.store.add_picture(picture, content)
            uids.append(picture.uid)
        found = {"id": f"item {self._items}", "campaign": self.campaign, "caption": caption}
        item = Item(**{**found, "uids": tuple(uids), "target": 0, **changes})  # type: ignore[arg-type]
        self.store.add_items([item])
        self._items += 1
        return item

    def ask(self, person: str) -> Ballot:
        self.now += 1
        ballot = self.store.issue(self.campaign, person, self.now, ONE_AFTER_ANOTHER)
        assert ballot is not None
        return ballot

    def answer(self, person: str, ballot: Ballot, best: int, **changes: object) -> int:
        """Prefers the picture with this number; the vote's number in the log."""
        left = ballot.shown[0] == picture_uid(png(best, self.side))
        said = {"nonce": ballot.id, "choice": "left" if left else "right", "decide_ms": 900.0}
        answer = Answer(**{**said, **changes})  # type: ignore[arg-type]
        return self.store.vote(person, ballot.id, answer, self.now).seq

    def vote(self, person: str, caption: str, values: Sequence[int], **changes: object) -> int:
        """A new item for this person alone, of which the first picture is preferred."""
        self.add(caption, values, annotator=person)
        return self.answer(person, self.ask(person), values[0], **changes)
