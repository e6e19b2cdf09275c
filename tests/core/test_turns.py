"""Turns of threads: who is next, who waits for whom, and that nothing is done under what another
piece put in place. Threads meet by events; ``LIMIT`` only bounds a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from rlalign.core.turns import Turn, Turns, give_turn, take_turn, waited_seconds

LIMIT = 60.0


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Piece:
    """A piece on a thread of its own that does each of its steps when the test says so."""

    def __init__(self, turns: Turns, threads: ThreadPoolExecutor, under: str = "") -> None:
        self._turns = turns
        self._threads = threads
        self._steps: list[Callable[[Turn], None]] = []
        self._asked = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self.turn: Turn | None = None
        self._entered = threading.Event()
        self.result: Future[None] = threads.submit(self._run, under)
        assert self._entered.wait(LIMIT)

    def _run(self, under: str) -> None:
        with self._turns.piece(under) as turn:
            self.turn = turn
            self._entered.set()
            while True:
                self._asked.acquire()
                step = self._steps.pop(0)
                if step is None:
                    return
                step(turn)
                self._done.release()

    def begin(self, step: Callable[[Turn], None] | None) -> None:
        """Has a step done, or the piece ended; does not wait for it."""
        self._steps.append(step)  # type: ignore[arg-type]
        self._asked.release()

    def do(self, step: Callable[[Turn], None]) -> None:
        self.begin(step)
        self.finish()

    def finish(self) -> None:
        """Waits for the step that was begun."""
        assert self._done.acquire(timeout=LIMIT)

    def end(self) -> None:
        self.begin(None)
        self.result.result(LIMIT)


def wanting(piece: Piece) -> None:
    """Waits until a piece waits for its turn."""
    while piece.turn is None or not piece.turn.wants:
        threading.Event().wait(0.001)


def take(turn: Turn) -> None:
    take_turn()


def give(turn: Turn) -> None:
    give_turn()


def test_one_has_it_at_a_time_and_the_oldest_is_next(threads: ThreadPoolExecutor) -> None:
    turns = Turns()
    first, second, third = (Piece(turns, threads) for _ in range(3))
    order: list[str] = []
    first.do(take)
    third.begin(lambda turn: (take_turn(), order.append("third"))[0])
    wanting(third)
    second.begin(lambda turn: (take_turn(), order.append("second"))[0])
    wanting(second)
    assert order == []
    first.end()
    second.finish()
    assert order == ["second"]
    second.do(give)
    third.finish()
    assert order == ["second", "third"]
    second.end()
    third.end()


def test_what_gives_its_turn_has_it_again_before_one_that_has_not_begun(
    threads: ThreadPoolExecutor,
) -> None:
    turns = Turns()
    first, second, third = (Piece(turns, threads) for _ in range(3))
    second.do(take)
    second.do(give)
    third.do(take)
    first.begin(take)
    wanting(first)
    second.begin(take)
    wanting(second)
    third.end()
    second.finish()
    assert first.turn is not None
    assert first.turn.wants
    second.end()
    first.finish()
    first.end()


def test_pieces_under_other_weights_wait_until_all_before_have_ended(
    threads: ThreadPoolExecutor,
) -> None:
    """A turn that is given is not enough: its piece may come back to what it had begun."""
    turns = Turns()
    old, same, new = (Piece(turns, threads, under) for under in ("v1", "v1", "v2"))
    old.do(take)
    old.do(give)
    new.begin(take)
    wanting(new)
    assert new.turn is not None
    assert not new.turn.begun
    old.do(take)  # one that has begun goes on before it
    old.end()
    new.finish()

    # one that is older, has not begun and is under other weights waits for it, and lets it go on
    new.do(give)
    same.begin(take)
    wanting(same)
    new.do(take)
    new.end()
    same.finish()
    same.end()


def test_a_piece_that_fails_ends_its_turn(threads: ThreadPoolExecutor) -> None:
    turns = Turns()

    def fail() -> None:
        with turns.piece():
            take_turn()
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        threads.submit(fail).result(LIMIT)
    other = Piece(turns, threads)
    other.do(take)
    other.end()


def test_without_a_piece_there_is_nothing_to_wait_for(threads: ThreadPoolExecutor) -> None:
    take_turn()
    give_turn()
    assert waited_seconds() == 0.0
    turns = Turns()
    with turns.piece() as turn:
        take_turn()
        take_turn()
        assert turn.begun
        # that of another thread is not this one's
        assert threads.submit(waited_seconds).result(LIMIT) == 0.0
