"""Threads that share something which one of them may use at a time, such as a policy: each does a
piece of work, has its turn, and gives it to the next while it waits for something else.

    piece A   takes ------ uses ------ gives -- waits for a score --> done
    piece B   gets ready .............. takes ------ uses ------ ...

Of pieces that want their turn, one that has begun has it first, then the oldest. Those that differ
in what they are done under (the version of weights) never have begun and not ended at the same
time, so none sees what another one put in place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CURRENT: ContextVar[Turn | None] = ContextVar("turn", default=None)


def take_turn() -> None:
    """Waits for the turn of the piece of work that this thread does, before it uses what it shares
    with others; does nothing where it has it, or shares nothing."""
    turn = _CURRENT.get()
    if turn is not None:
        turn.take()


def give_turn() -> None:
    """Lets the next piece have its turn, before this thread waits for something else."""
    turn = _CURRENT.get()
    if turn is not None:
        turn.give()


def waited_seconds() -> float:
    """How long the piece of work that this thread does has waited for its turn so far."""
    turn = _CURRENT.get()
    return 0.0 if turn is None else turn.waited


class Turn:
    """One piece's right to the thing that is shared. Of one thread."""

    def __init__(self, turns: Turns, under: Hashable) -> None:
        self.under = under
        self.begun = False
        """Whether it had its turn once."""
        self.wants = False
        """Whether it waits for its turn now."""
        self.waited = 0.0
        """Seconds in which others had it."""
        self._turns = turns

    def take(self) -> None:
        """Waits until the turn is this piece's; does nothing where it is already."""
        start = time.monotonic()
        self._turns.wait(self)
        self.waited += time.monotonic() - start

    def give(self) -> None:
        """Lets the next one have it, where it is this piece's."""
        self._turns.leave(self)


class Turns:
    """Who may use what is shared, and who is next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: list[Turn] = []  # that have not ended, the oldest first
        self._holder: Turn | None = None

    @contextmanager
    def piece(self, under: Hashable = None) -> Iterator[Turn]:
        """A piece of work, in the order of asking; it takes its turn by itself, and has none when
        it has ended."""
        turn = Turn(self, under)
        with self._changed:
            self._pieces.append(turn)
        token = _CURRENT.set(turn)
        try:
            yield turn
        finally:
            _CURRENT.reset(token)
            with self._changed:
                self._pieces.remove(turn)
                self._free(turn)

    def wait(self, turn: Turn) -> None:
        """Waits until a piece is the next, and hands it the turn."""
        with self._changed:
            if self._holder is turn:
                return
            turn.wants = True
            try:
                self._changed.wait_for(lambda: self._is_next(turn))
            finally:
                turn.wants = False
            turn.begun = True
            self._holder = turn

    def leave(self, turn: Turn) -> None:
        """Ends a piece's turn, where it has it."""
        with self._changed:
            self._free(turn)

    def _free(self, turn: Turn) -> None:
        if self._holder is turn:
            self._holder = None
        self._changed.notify_all()

    def _is_next(self, turn: Turn) -> bool:
        """Whether nobody has the turn, this piece is the first of those that want it, and all that
        have begun and not ended are done under the same."""
        first = min((p for p in self._pieces if p.wants), key=lambda piece: not piece.begun)
        if self._holder is not None or first is not turn:
            return False
        return all(p.under == turn.under for p in self._pieces if p.begun)
