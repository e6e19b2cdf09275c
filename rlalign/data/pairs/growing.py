"""Preference pairs from people's votes: a set that grows while a run learns from it.

The pairs of round r depend on (settings, seed, r), the log of votes, and two cursors: how long the
log was when round r began, and when the one before it did. Cursors are decided once, before the
round, and kept (``facts``): given the log and them, every round can be made again bit for bit.

A round takes the votes since the round before first, in a keyed order, and fills itself with a
keyed choice of the earlier ones; where there are fewer than it takes, it starts over.

What it costs: each round reads the campaign's votes once (no pictures), and the pictures of its own
pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from rlalign.core.prompts import dump_record
from rlalign.core.registry import UserError
from rlalign.data.pairs.campaign import VotePair, one_campaign, read_vote_pairs
from rlalign.data.pairs.rows import Pair, to_pair
from rlalign.data.pairs.settings import Pairing, PreferenceSettings
from rlalign.diffusion.noise import generator

POLL_SECONDS = 0.5
"""Between two looks at the store while a round waits for votes."""
SAY_SECONDS = 30.0
"""Between two lines about what a round waits for."""

Say = Callable[[str], None]


class GrowingPairs(Pairing):
    """The pairs of each round, from the votes in a store of ballots.

    ``wait`` decides a round's cursor; ``round`` may be asked once it has. Raises UserError where
    the store cannot be opened or has several campaigns and none is named.
    """

    grows: ClassVar[bool] = True

    def __init__(
        self, settings: PreferenceSettings, seed: int, what: str = "round", *, frames: int = 0
    ) -> None:
        """``what`` is it that waits, in words; ``frames`` are those of every picture or clip, 0
        takes any of which a pair has the same."""
        from rlalign.ballots.store import Store

        assert settings.ballots is not None, "settings of a set that grows"
        self.settings = settings
        self.seed = seed
        self.frames = frames
        self._what = what
        self._ballots = settings.ballots
        self._store = Store.open(settings.ballots.store)
        self.cursors: list[int] = []
        """Round -> the length of the log when it began, of the rounds that have."""

    def close(self) -> None:
        """Closes the store."""
        self._store.close()

    # --- which votes a round sees ----------------------------------------------------------------

    def facts(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of it, JSON-able."""
        return {"cursors": list(self.cursors)}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Takes up what a checkpoint kept."""
        self.cursors = [int(cursor) for cursor in facts.get("cursors", ())]

    def wait(self, number: int, say: Say, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Waits until the log has the votes that a round wants, and decides its cursor; False where
        ``stopped`` says so meanwhile. A round that has its cursor waits for nothing.

        Raises UserError when patience is over.
        """
        began = time.monotonic()
        told = began - SAY_SECONDS
        looked = -1
        missing = ""
        while number >= len(self.cursors):
            # the votes are read where there are new ones
            cursor = self._store.cursor()
            if cursor != looked:
                looked = cursor
                missing = self._missing(number, cursor)
            if not missing:
                self.cursors.append(cursor)
                break

            # what is waited for is said now and then
            now = time.monotonic()
            patience = self._ballots.patience_seconds
            if patience and now - began > patience:
                raise UserError(
                    f"{missing}, and preferences.ballots.patience_seconds ({patience:g}) are over;"
                    " let people vote (rlalign vote), then go on with the run"
                )
            if now - told >= SAY_SECONDS:
                say(missing)
                told = now
            if stopped():
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _missing(self, number: int, cursor: int) -> str:
        """What a round still waits for, in words; empty where nothing is missing."""
        ballots = self._ballots
        campaign = one_campaign(self._store, ballots.campaign)
        if not campaign:
            which = f"campaign {ballots.campaign!r}" if ballots.campaign else "a campaign"
            return (
                f"{self._what} {number + 1} waits for {which} in {self._shown}, which has none yet"
            )

        # votes since the round before, and in all
        seen = self.cursors[number - 1] if number else 0
        pairs = self._usable(campaign, cursor)
        votes = {pair.seq for pair in pairs}
        fresh = sum(seq > seen for seq in votes)
        wanted = ballots.fresh if number else max(ballots.fresh, ballots.least)
        if fresh >= wanted and votes:
            return ""
        since = f" since {self._what} {number}" if number else ""
        return (
            f"{self._what} {number + 1} waits for votes in {self._shown}: {fresh} of"
            f" {max(wanted, 1)} are there{since}"
        )

    @property
    def _shown(self) -> str:
        """The store's name, without a password."""
        return self._ballots.store.rpartition("@")[2]

    # --- the pairs of a round --------------------------------------------------------------------

    def round(self, number: int) -> list[Pair]:
        campaign = one_campaign(self._store, self._ballots.campaign)
        chosen = self._chosen(number, self._usable(campaign, self.cursors[number]))
        return [self._pair(one) for one in chosen]

    def measures(self, number: int) -> Mapping[str, float]:
        campaign = one_campaign(self._store, self._ballots.campaign)
        cursor = self.cursors[number]
        seen = self.cursors[number - 1] if number else 0
        votes = {pair.seq for pair in self._usable(campaign, cursor)}
        return {
            "votes/cursor": cursor,
            "votes/all": len(votes),
            "votes/fresh": sum(seq > seen for seq in votes),
        }

    def first(self) -> Pair | None:
        """The first pair that there is; None where there is none yet."""
        campaign = one_campaign(self._store, self._ballots.campaign)
        pairs = self._usable(campaign, self._store.cursor()) if campaign else []
        return self._pair(pairs[0]) if pairs else None

    def __len__(self) -> int:
        """Pairs that the votes of now make."""
        campaign = one_campaign(self._store, self._ballots.campaign)
        return len(self._usable(campaign, self._store.cursor())) if campaign else 0

    @property
    def captions(self) -> list[str]:
        """The captions of the votes of now, each once."""
        campaign = one_campaign(self._store, self._ballots.campaign)
        found = self._usable(campaign, self._store.cursor()) if campaign else []
        return list(dict.fromkeys(pair.caption for pair in found))

    def _usable(self, campaign: str, cursor: int) -> list[VotePair]:
        found = read_vote_pairs(self._store, campaign, self._ballots, cursor)
        if self.settings.ties == "drop":
            found = [pair for pair in found if pair.label_0 != 0.5]
        return [pair for pair in found if pair.uid_0 != pair.uid_1]

    def _chosen(self, number: int, pairs: Sequence[VotePair]) -> list[VotePair]:
        """As many as a round takes: new ones, then earlier ones, each in a keyed order."""
        assert pairs, "a round that has waited has a pair"
        seen = self.cursors[number - 1] if number else 0
        fresh = [pair for pair in pairs if pair.seq > seen]
        earlier = [pair for pair in pairs if pair.seq <= seen]
        size = self.settings.pairs_per_round
        chosen: list[VotePair] = []
        while len(chosen) < size:
            chosen += self._shuffled(fresh, number, "fresh", len(chosen))
            chosen += self._shuffled(earlier, number, "earlier", len(chosen))
        order = generator("votes", self.seed, "order", number).permutation(size)
        return [chosen[i] for i in order]

    def _shuffled(
        self, pairs: Sequence[VotePair], number: int, which: str, place: int
    ) -> Iterator[VotePair]:
        order = generator("votes", self.seed, which, number, place).permutation(len(pairs))
        return (pairs[i] for i in order)

    def _pair(self, one: VotePair) -> Pair:
        """Raises UserError where the store lacks a picture, or has one that cannot be decoded."""
        made = self._store.picture(one.uid_0)
        row = {
            "row": f"{self._shown}:{one.seq}",
            "caption": one.caption,
            "label_0": one.label_0,
            "model_0": made.policy if made is not None else "",
            "record": dump_record(made.prompt) if made is not None else "",
        }
        try:
            row["jpg_0"] = self._store.content(one.uid_0)
            row["jpg_1"] = self._store.content(one.uid_1)
            return to_pair(row, self.settings.size, self.settings.resize, self.frames)
        except ValueError as error:
            raise UserError(f"preferences.ballots: vote {row['row']}: {error}") from error
