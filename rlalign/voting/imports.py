"""Votes that were given elsewhere, taken into a store: Label Studio's pairwise exports.

Each judgement becomes an item for its person alone, a ballot and a vote, so that results and
exports count it as any other. The same export again adds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlalign.ballots.label_studio import Judgement, read_judgements
from rlalign.ballots.records import Answer, Campaign, Item, Kind, digest
from rlalign.ballots.store import Store
from rlalign.core.registry import UserError
from rlalign.data.pairs.campaign import one_campaign
from rlalign.data.pairs.votes import rows_of_judgements
from rlalign.voting.pictures import PictureFile
from rlalign.voting.sources.files import as_shown


@dataclass(frozen=True, kw_only=True)
class _Only:
    """Deals one item and no other; a ``Dealer``."""

    item: str
    repeat_after: int = 1 << 30

    def kind(self, available: Sequence[Kind], rng: np.random.Generator) -> tuple[Kind, float]:
        assert "live" in available, "the item was added"
        return "live", 1.0

    def pick(self, items: Sequence[Item], rng: np.random.Generator) -> tuple[int, float, str]:
        return [item.id for item in items].index(self.item), 1.0, "imported"


def import_votes(store: Store, campaign: str, file: Path) -> int:
    """Takes an export into a campaign, which is made where there is none of this name; returns how
    many votes are new.

    Pictures are the files that it names, below its folder. Raises UserError where it is no export
    or lacks a picture.
    """
    name = one_campaign(store, campaign) if not campaign or store.campaign(campaign) else campaign
    if not name:
        raise UserError("--campaign must name the campaign that the votes are taken into")
    if store.campaign(name) and store.stock(name, time.time()).items.get("live"):
        raise UserError(
            f"campaign {name!r} still asks people; take the votes into one of their own with"
            " --campaign NAME"
        )
    judgements = list(read_judgements(file))
    rows = list(rows_of_judgements(judgements, file.parent))
    store.create_campaign(Campaign(id=name, mode="pairs", created=time.time()))
    taken = 0
    for judgement, row in zip(judgements, rows, strict=True):
        known = {"caption": judgement.caption}
        files = [as_shown(row[f"jpg_{side}"], judgement.task, **known) for side in (0, 1)]
        taken += _take(store, name, judgement, files)
    return taken


def _take(store: Store, campaign: str, said: Judgement, files: Sequence[PictureFile]) -> int:
    """Adds one judgement; 0 where it is there already."""
    uids = tuple(file.picture.uid for file in files)
    for file in files:
        store.add_picture(file.picture, file.content)
    person = store.join(said.annotator, f"label studio/{said.annotator}", "", said.at).id
    item = Item(
        id=digest("label studio", campaign, said.task, said.annotator, *uids),
        campaign=campaign,
        caption=said.caption,
        uids=uids,
        annotator=person,
        rule="imported",
        target=1,
    )
    if not store.add_items([item]):
        return 0
    ballot = store.issue(campaign, person, said.at, _Only(item=item.id))
    assert ballot is not None and ballot.item.id == item.id, "nothing else was open"
    choice = said.outcome
    if choice != "tie" and ballot.shown != uids:
        # the store has drawn the sides anew; the picture that was preferred stays preferred
        choice = "right" if choice == "left" else "left"
    answer = Answer(nonce=item.id, choice=choice, decide_ms=said.decide_ms)
    store.vote(person, ballot.id, answer, said.at)
    return 1
