"""Simulated people: each knows the hidden utility, and chooses by it with noise.

Of two pictures the left one is chosen with probability

    lapse / 2 + (1 - lapse) * sigmoid((u_left - u_right) / temperature + left)

(Bradley & Terry 1952, with a left intercept and a share of choices by a coin); several are put in
an order by drawing the best of those that are left (Plackett 1975, Luce 1959). A choice is keyed by
(seed, person, number of the choice), never by when it is asked for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer, Ballot, picture_uid
from rlalign.ballots.store import Store
from rlalign.core.clips import read_clip
from rlalign.rewards.base import Scorer, score, total
from rlalign.voting.pairing import rng_of
from rlalign.voting.settings import Simulate

POLL_SECONDS = 0.1
"""Between two looks whether there is something to vote on."""
SLOWEST_MS = 20_000.0


class Judge:
    """What a simulated person sees in pictures, and how one is chosen."""

    def __init__(self, settings: Simulate, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self._scorers: dict[str, Scorer] = {r.title: r.load_scorer("cpu") for r in settings.utility}
        self._known: dict[tuple[str, str], float] = {}

    def utilities(self, caption: str, contents: Sequence[bytes]) -> np.ndarray:
        """(N,) the hidden utility of each picture's file."""
        return np.array([self._utility(caption, content) for content in contents])

    def _utility(self, caption: str, content: bytes) -> float:
        key = (caption, picture_uid(content))
        if key not in self._known:
            media_BFCHW = read_clip(content)[None]
            rewards = self.settings.utility
            raw = {
                r.title: score(r, self._scorers[r.title], media_BFCHW, [caption]) for r in rewards
            }
            self._known[key] = float(total(rewards, raw)[0])
        return self._known[key]

    def chance_of_left(self, difference: float) -> float:
        """Probability that the left picture is chosen, which is better by ``difference``."""
        settings = self.settings
        logit = difference / settings.temperature + settings.left
        wins = 1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0)))
        return settings.lapse / 2 + (1 - settings.lapse) * wins

    def answer(self, caption: str, contents: Sequence[bytes], *key: object) -> Answer:
        """What a person says to pictures as they are shown, left to right; ``key`` names the person
        and the choice."""
        rng = rng_of("judge", self.seed, *key)
        utility_N = self.utilities(caption, contents)
        decide_ms = float(np.clip(rng.lognormal(7.3, 0.4), 300.0, SLOWEST_MS))
        said = {
            "nonce": secrets.token_hex(8),
            "visible_ms": decide_ms + 200.0,
            "decide_ms": decide_ms,
            "device": {"input": "other"},
        }
        if len(contents) > 2:
            return Answer(choice="rank", ranking=self._ranking(utility_N, rng), **said)
        left = rng.random() < self.chance_of_left(float(utility_N[0] - utility_N[1]))
        return Answer(choice="left" if left else "right", **said)

    def _ranking(self, utility_N: np.ndarray, rng: np.random.Generator) -> tuple[tuple[int], ...]:
        """An order, best first: Gumbel noise on the utilities draws it."""
        if rng.random() < self.settings.lapse:
            return tuple((int(i),) for i in rng.permutation(len(utility_N)))
        noisy_N = utility_N / self.settings.temperature + rng.gumbel(size=len(utility_N))
        return tuple((int(i),) for i in np.argsort(-noisy_N))


def agreement(judge: Judge, differences: Sequence[float]) -> float:
    """Probability that two people choose the same picture, over pairs that differ by so much in
    utility, each shown with either side on the left."""
    same = []
    for difference in differences:
        for sign in (1.0, -1.0):
            wins = judge.chance_of_left(sign * difference)
            same.append(wins**2 + (1 - wins) ** 2)
    return float(np.mean(same))


@dataclass(kw_only=True)
class People:
    """Simulated people who vote over a store, one after the other, as the page would have it."""

    store: Store
    campaign: str
    dealer: Deal
    judge: Judge
    clock: Callable[[], float] = time.time
    poke: Callable[[], None] = lambda: None
    """Called after every vote, and while nobody has anything to vote on."""
    given: int = field(default=0, init=False)

    def run(self, *, over: Callable[[], bool] = lambda: False) -> int:
        """Votes until all votes are given, or ``over`` says that no more pictures come; how many
        votes were given."""
        settings = self.judge.settings
        names = [f"simulated {number + 1}" for number in range(settings.people)]
        people = [
            self.store.join(name, f"{self.campaign}/{name}", "", self.clock()).id for name in names
        ]
        left = list(people)
        turn = 0
        while self.given < settings.votes and left:
            person = left[turn % len(left)]
            ballot = self._ballot(person, over)
            if ballot is None:
                left.remove(person)
                continue
            self._vote(people.index(person), ballot)
            turn += 1
        return self.given

    def _ballot(self, person: str, over: Callable[[], bool]) -> Ballot | None:
        """The person's next ballot, waited for; None where there will be none."""
        while True:
            # asked last: whatever came before the end is voted on
            ended = over()
            ballot = self.store.issue(self.campaign, person, self.clock(), self.dealer)
            if ballot is not None or ended:
                return ballot
            stock = self.store.stock(self.campaign, self.clock())
            if stock.items.get("live") and not stock.open:
                # others may be asked what is there, and this person has had it
                return self.store.issue(self.campaign, person, self.clock(), self.dealer)
            self.poke()
            time.sleep(POLL_SECONDS)

    def _vote(self, person: int, ballot: Ballot) -> None:
        contents = [self.store.content(uid) or b"" for uid in ballot.shown]
        prompt = self.store.prompt_of(ballot.item)
        answer = self.judge.answer(prompt, contents, person, ballot.number)
        self.store.vote(ballot.annotator, ballot.id, answer, self.clock())
        self.given += 1
        self.poke()
