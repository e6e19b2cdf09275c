"""What the page asks of whoever holds ballots and pictures, and the records between the two.

A desk is asked from several threads at once. It knows a person by an id that the page has read from
a signed cookie; nothing that a browser sends says who, which pictures or which prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlalign.web.refused import Refused

MODES = ("pairs", "chain", "rank", "ab")


class Declined(Refused):
    """A request that is not served: an HTTP status, one sentence, and a code under which a language
    file may have words of its own."""

    def __init__(self, status: int, code: str, sentence: str) -> None:
        super().__init__(status, sentence)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class About:
    """What does not change while a page is served."""

    title: str
    mode: str
    allowed: tuple[str, ...]
    """Choices that are taken, of left, right, tie, both_bad, skip and rank."""
    reasons: tuple[str, ...] = ()
    """What a vote may give as its reasons; () asks for none."""
    points: bool = False
    """Whether a person may point at places in the pictures."""
    typing: bool = False
    """Whether a person may type a prompt."""
    consent: str = ""
    """What a person agrees to before the first vote; "" asks nothing."""
    consent_version: str = ""
    names_after: bool = False
    """Whether the names of the two policies are told after the vote."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a person is, and what is going on behind the page."""

    done: int
    of: int
    """Votes that this person may give in all; 0 says that there is no end to it."""
    waiting: str = ""
    """Why there is nothing to vote on, a code of ``Waiting``; "" where there is."""
    made: int = 0
    """Pictures that are ready, of those that somebody waits for."""
    to_make: int = 0
    round: int | None = None
    """The round of training that reads these votes."""
    votes: tuple[int, int] | None = None
    """The first and the last vote that it learns from; None until it has begun."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A ballot as one person sees it; ``uids`` from left to right."""

    ballot: str
    mode: str
    prompt: str
    uids: tuple[str, ...]
    progress: Progress
    ahead: tuple[str, ...] = ()
    """Pictures that the ballot after this one is likely to show."""
    chain: int = 0
    """How many choices this prompt has had in a row, in the mode chain."""
    clips: frozenset[str] = frozenset()
    """Those of ``uids`` and ``ahead`` that are clips."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """There is no ballot now. ``code``: "drawing" (pictures are being made), "empty" (this person
    has had all), "broken" (pictures cannot be made), "prompt" (a prompt has to be typed first),
    "learning" (a round of training comes first)."""

    code: str
    progress: Progress
    words: str = ""
    """What cannot be made and why, where the code is "broken"."""
    ahead: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A vote as a browser sends it, checked for form alone."""

    ballot: str
    nonce: str
    choice: str
    ranking: tuple[int, ...] = ()
    """Shown places, best first, where the choice is "rank"."""
    reasons: tuple[str, ...] = ()
    points: tuple[tuple[int, float, float], ...] = ()
    """(shown place, x, y), the last two as shares of the width and the height."""
    visible_ms: int = 0
    """How long the pictures were visible, all decoded, on a page that was not hidden."""
    decide_ms: int = 0
    """From their first sight to the choice."""
    device: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of a vote that is on disk."""

    status: str
    """"recorded", or "again" where this ballot had a vote already, which stays as it was."""
    names: tuple[str, ...] = ()
    """The policies of the pictures as they were shown, where the page tells them."""


class Notice:
    """Tells listeners that something may have changed: pictures made, votes given. ``ring`` may be
    called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[Callable[[str], None]] = set()

    def ring(self, annotator: str = "") -> None:
        """Calls every listener with the person whom it concerns, "" for everybody."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener(annotator)

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Adds a listener, which must not block; what comes back takes it away again."""
        with self._lock:
            self._listeners.add(listener)

        def leave() -> None:
            with self._lock:
                self._listeners.discard(listener)

        return leave


class Desk(Protocol):
    """Every verb may raise Declined."""

    about: About
    notice: Notice

    def join(self, token: str, name: str, consent: str) -> str:
        """The id of the person with this token, a new one where it is first used."""
        ...

    def knows(self, annotator: str) -> bool:
        """Whether a person may still vote here (not deleted)."""
        ...

    def ballot(self, annotator: str) -> Sheet | Waiting:
        """The person's open ballot, else a new one, else why there is none."""
        ...

    def vote(self, annotator: str, choice: Choice) -> Receipt:
        """Has the vote on disk when it returns."""
        ...

    def undo(self, annotator: str, nonce: str) -> bool:
        """Opens the person's last ballot again; False where there is none to open. The same nonce
        again changes nothing."""
        ...

    def prompt(self, annotator: str, text: str) -> None:
        """From now on this person votes on pictures of this prompt; "" takes the next from the
        list."""
        ...

    def picture(self, uid: str) -> bytes:
        """A picture's file."""
        ...

    def progress(self, annotator: str) -> Progress:
        """How far a person is."""
        ...

    def results(self) -> Mapping[str, Any]:
        """The numbers of /results, as ``results.py`` shows them."""
        ...

    def export(self) -> Iterator[str]:
        """Every effective vote as a line of JSON."""
        ...
