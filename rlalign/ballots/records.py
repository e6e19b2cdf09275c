"""The records of people's choices: frozen, keyword-only, and what a choice must be like.

A *campaign* asks people; an *item* is what can be asked: a caption and two or more pictures. A
*ballot* is an item dealt to one *annotator*, its pictures in a drawn order; a *vote* is the answer.

*Uids* name pictures by their bytes. *Places* count pictures as they were shown, 0 is leftmost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, get_args

from rlalign.core.files import dump_json
from rlalign.core.prompts import Prompt

Mode = Literal["pairs", "chain", "rank", "ab"]
Kind = Literal["live", "gold", "repeat", "shared"]
Choice = Literal["left", "right", "tie", "both_bad", "skip", "rank"]
Outcome = Literal["left", "right", "tie"]
Status = Literal["active", "left_out", "deleted"]
Ranking = tuple[tuple[int, ...], ...]
"""Groups of places, the best first; places of one group are equally good."""

KINDS: tuple[Kind, ...] = get_args(Kind)
PAIR_CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "both_bad", "skip")
RANK_CHOICES: tuple[Choice, ...] = ("rank", "skip")

MAX_REASONS, MAX_REASON_CHARACTERS = 16, 64
MAX_POINTS = 64
MAX_NONCE_CHARACTERS = 64
MAX_DEVICE_BYTES = 2048
_DAY_MS = 86_400_000


class Refused(Exception):
    """What a person asked for and is not given: ``reason`` for programs, the words for people."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What people are asked, and how; ``settings`` are the page's own, kept as JSON."""

    id: str
    mode: Mode
    settings: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0
    """Seconds since 1970, as all times here."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture or clip, and what it was made with; its bytes are kept beside it."""

    uid: str
    caption: str
    policy: str = ""
    """Who made it: what is compared in a blind A/B."""
    seed: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its making, and under ``record`` that of its prompt, where it has one."""
    frames: int = 1
    media_type: str = "image/png"
    rate: float = 0.0
    """Frames a second of a clip; 0 of a picture, and of a clip of an older store."""

    @property
    def prompt(self) -> str:
        """The caption with its record, where it has one."""
        record = self.plan.get("record")
        return Prompt(self.caption, record) if record else self.caption


@dataclass(frozen=True, kw_only=True)
class Item:
    """What can be asked: which of these pictures is the best for the caption."""

    id: str
    campaign: str
    caption: str
    uids: tuple[str, ...]
    kind: Kind = "live"
    truth: str = ""
    """The uid that a gold item expects."""
    of_ballot: str = ""
    """The ballot that a repeat asks again."""
    annotator: str = ""
    """Who alone may be asked (a chain's own pair, a repeat); empty for everybody."""
    rule: str = "random"
    propensity: float = 1.0
    """The rule that put these pictures together, and with what probability it did so."""
    target: int = 1
    """Votes wanted; 0 for no limit. A skip is no vote."""


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """An item dealt to one person."""

    id: str
    annotator: str
    number: int
    """Ballots of this person in this campaign before it."""
    item: Item
    order: tuple[int, ...]
    """``item.uids[order[place]]`` is the picture at that place."""
    rule: str
    propensity: float
    """The rule that dealt the item, and the probability that it was dealt and put together so."""
    issued: float
    expires: float = field(compare=False)
    """Put off whenever it is shown again, so it is no part of which ballot this is."""

    @property
    def campaign(self) -> str:
        return self.item.campaign

    @property
    def shown(self) -> tuple[str, ...]:
        """The uids as they were shown, left to right."""
        return tuple(self.item.uids[i] for i in self.order)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a person says to a ballot: the browser's message once its types are checked."""

    nonce: str
    """Names this click: the same one again is the same answer."""
    choice: Choice
    ranking: Ranking = ()
    reasons: tuple[str, ...] = ()
    points: tuple[tuple[int, float, float], ...] = ()
    """(place, x, y), x and y in [0, 1] from the left upper corner."""
    visible_ms: float = 0.0
    """Time that the pictures were visible."""
    decide_ms: float = 0.0
    """Time from the first sight of all pictures to the choice."""
    device: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """An answer in the log."""

    seq: int
    """Its place in the log; later rows of a store have larger ones."""
    ballot: Ballot
    answer: Answer
    at: float

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Uids in groups, the best first; one group for a tie or two bad ones, none for a skip."""
        shown = self.ballot.shown
        choice = self.answer.choice
        if choice == "skip":
            return ()
        if choice == "rank":
            return tuple(tuple(shown[place] for place in group) for group in self.answer.ranking)
        if choice in ("tie", "both_bad"):
            return (shown,)
        return ((shown[0],), (shown[1],)) if choice == "left" else ((shown[1],), (shown[0],))

    @property
    def best(self) -> str:
        """The uid that was preferred to all others; empty where there is none."""
        groups = self.groups
        return groups[0][0] if len(groups) > 1 and len(groups[0]) == 1 else ""

    @property
    def pairs(self) -> tuple[tuple[str, str, Outcome], ...]:
        """(left uid, right uid, outcome) of each two pictures; two bad ones are a tie."""
        groups = self.groups
        level = {uid: number for number, group in enumerate(groups) for uid in group}
        found: list[tuple[str, str, Outcome]] = []
        for left, right in combinations(self.ballot.shown if groups else (), 2):
            ahead = level[right] - level[left]
            found.append((left, right, "left" if ahead > 0 else "right" if ahead < 0 else "tie"))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """A person who votes, under a pseudonym."""

    id: str
    name: str
    consent: str
    """The version of the text that was agreed to."""
    status: Status
    joined: float


@dataclass(frozen=True, kw_only=True)
class Stock:
    """How much there is to ask and what was answered."""

    items: Mapping[str, int]
    """By kind, those that wait for a vote."""
    votes: int
    """Effective votes without skips."""
    open: int
    """Ballots that people have before them."""


def digest(*parts: object) -> str:
    """32 hexadecimal digits that name the parts (blake2b)."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def picture_uid(content: bytes) -> str:
    """The name of a picture: blake2b of its bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def allowed_choices(ballot: Ballot, mode: Mode) -> tuple[Choice, ...]:
    """What may be answered to a ballot."""
    return RANK_CHOICES if mode == "rank" and len(ballot.shown) > 2 else PAIR_CHOICES


def check_answer(ballot: Ballot, answer: Answer, mode: Mode) -> None:
    """Raises Refused("bad_choice") where an answer cannot be one to this ballot."""
    fault = _fault(answer, len(ballot.shown), allowed_choices(ballot, mode))
    if fault:
        raise Refused("bad_choice", fault)


def _fault(answer: Answer, count: int, allowed: tuple[Choice, ...]) -> str:
    """What is wrong with an answer; empty when nothing is."""
    # the choice itself
    if not 1 <= len(answer.nonce) <= MAX_NONCE_CHARACTERS:
        return f"nonce must have 1 to {MAX_NONCE_CHARACTERS} characters, got {len(answer.nonce)}"
    if answer.choice not in allowed:
        return f"choice must be one of {', '.join(allowed)}, got {answer.choice!r}"
    places = sorted(place for group in answer.ranking for place in group)
    if places != (list(range(count)) if answer.choice == "rank" else []):
        return f"ranking must name each of the {count} places once with choice rank, and none else"
    if not all(answer.ranking):
        return "ranking must have a place in each group"

    # what is said beside it
    if len(answer.reasons) > MAX_REASONS or any(
        not 1 <= len(reason) <= MAX_REASON_CHARACTERS for reason in answer.reasons
    ):
        return f"reasons must be up to {MAX_REASONS} of 1 to {MAX_REASON_CHARACTERS} characters"
    if len(answer.points) > MAX_POINTS or not all(
        0 <= place < count and 0 <= x <= 1 and 0 <= y <= 1 for place, x, y in answer.points
    ):
        return f"points must be up to {MAX_POINTS} of (place, x, y), x and y within 0 and 1"
    times = (answer.visible_ms, answer.decide_ms)
    if not all(math.isfinite(one) and 0 <= one <= _DAY_MS for one in times):
        return f"times must be within 0 and {_DAY_MS} milliseconds, got {times}"
    if len(dump_json(answer.device).encode()) > MAX_DEVICE_BYTES:
        return f"device must be JSON of up to {MAX_DEVICE_BYTES} bytes"
    return ""
