"""Which pictures are compared: items out of groups of pictures, gold items and shared ones.

All of it is keyed by the campaign, its seed and the pictures, never by when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlalign.ballots.records import Item, Kind, digest
from rlalign.voting.pictures import PictureFile
from rlalign.voting.settings import Vote

Group = Sequence[PictureFile]
"""Pictures of one caption."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which two pictures of a group are compared."""

    first: int
    second: int
    rule: str = "random"
    propensity: float = 1.0
    """Probability that these two were chosen of the group."""


Pick = Callable[[Group, np.random.Generator], Choice]


def pick_random(group: Group, rng: np.random.Generator) -> Choice:
    """Any two pictures of a group, each pair with the same probability."""
    first, second = sorted(rng.permutation(len(group))[:2].tolist())
    pairs = len(group) * (len(group) - 1) / 2
    return Choice(first=first, second=second, propensity=1.0 / pairs)


def rng_of(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(int(digest("pairing", *key), 16)))


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Makes a campaign's items."""

    vote: Vote
    pick: Pick = field(default=pick_random)

    def items(self, groups: Sequence[Group]) -> list[Item]:
        """The items of a batch: one of each group, and the gold items that belong to them."""
        found: list[Item] = []
        for group in groups:
            item = self._item(group)
            if item is not None:
                found.append(item)
        return [*found, *self._gold(groups, len(found))]

    def _item(self, group: Group) -> Item | None:
        """The item of a group; None where its pictures are the same."""
        vote = self.vote
        uids = [made.picture.uid for made in group]
        rng = rng_of(vote.name, vote.seed, *uids)
        choice = Choice(first=0, second=1)
        if vote.mode == "rank":
            chosen = uids[: vote.per_item]
        else:
            if vote.mode == "pairs" and len(group) > 2:
                choice = self.pick(group, rng)
            chosen = [uids[choice.first], uids[choice.second]]
        if len(set(chosen)) < len(chosen):
            return None
        kind: Kind = "shared" if rng.random() < self._share_of_shared else "live"
        return Item(
            id=digest("item", vote.name, group[0].caption, *chosen),
            campaign=vote.name,
            caption=str(group[0].caption),
            uids=tuple(chosen),
            kind=kind,
            rule=choice.rule,
            propensity=choice.propensity,
            target=vote.votes_per_shared if kind == "shared" else vote.votes_per_item,
        )

    @property
    def _share_of_shared(self) -> float:
        """Of the items that are learned from, those that several people get: as many as their share
        of the ballots takes."""
        shares = self.vote.shares
        live = (1.0 - shares.gold - shares.repeat - shares.shared) / self.vote.votes_per_item
        shared = shares.shared / self.vote.votes_per_shared
        return shared / (live + shared)

    def _gold(self, groups: Sequence[Group], count: int) -> list[Item]:
        """Pairs whose answer is known: a picture of the caption against one of another caption.

        Everybody may be asked each of them, once.
        """
        vote = self.vote
        if vote.mode == "rank" or not vote.shares.gold or len(groups) < 2:
            return []
        found: list[Item] = []
        key = [group[0].picture.uid for group in groups]
        rng = rng_of(vote.name, vote.seed, "gold", *key)
        wanted = max(1, round(count * vote.shares.gold))
        for number in rng.permutation(len(groups))[:wanted].tolist():
            own = groups[number][0]
            other = groups[(number + 1 + int(rng.integers(len(groups) - 1))) % len(groups)][0]
            if own.caption == other.caption:
                continue
            uids = (own.picture.uid, other.picture.uid)
            found.append(
                Item(
                    id=digest("gold", vote.name, own.caption, *uids),
                    campaign=vote.name,
                    caption=str(own.caption),
                    uids=uids,
                    kind="gold",
                    truth=uids[0],
                    rule="gold",
                    target=0,
                )
            )
        return found
