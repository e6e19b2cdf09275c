"""One policy for pieces of work on several threads: while a piece waits for its words or a score,
or is handed over, the next one asks the policy."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

from rlalign.core.turns import Turn, Turns
from rlalign.engine.base import Rewards, Work
from rlalign.policies.base import Policy


class SharedPolicy:
    """A policy with as many seats as there are rewards. A seat counts for itself, and what it is
    asked goes to the same networks as what the others are asked, one piece at a time."""

    def __init__(self, policy: Policy, rewards: Sequence[Rewards]) -> None:
        self.seats = len(rewards)
        self.taken = 0
        """Seats that are taken, as whoever hands out pieces keeps count."""
        self._turns = Turns()
        self._seats: SimpleQueue[tuple[Policy, Rewards]] = SimpleQueue()
        for number, own in enumerate(rewards):
            self._seats.put((policy.beside() if number else policy, own))

    @contextmanager
    def seat(self, under: Hashable = None) -> Iterator[tuple[Policy, Rewards, Turn]]:
        """A seat for one piece, which is done under weights of this version. The policy waits for
        its turn by itself, as it is asked."""
        with self._turns.piece(under) as turn:
            own = self._seats.get()
            try:
                yield (*own, turn)
            finally:
                self._seats.put(own)


def read_words(work: Work, policy: Policy) -> None:
    """Has the words of a piece's prompts there before its turn."""
    policy.encode(work.unit.prompts, work.unit.plan)
