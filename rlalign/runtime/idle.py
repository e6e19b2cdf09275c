"""Who of a pool is given the next call, without a search through all of its members: with 2,000 of
them a search takes as long as all else that a unit costs the coordinator."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class IdleMembers:
    """Members of a pool that may be given a call: each is offered whenever that becomes true or its
    calls change, and need not be taken back when it ceases to be."""

    def __init__(self, in_flight: int) -> None:
        """``in_flight`` is how many calls a member may have."""
        self._in_flight = in_flight
        self._offers: list[tuple[int, int]] = []
        """(calls, number) as they were at some moment: a heap, each of them once."""
        self._known: set[tuple[int, int]] = set()

    def offer(self, number: int, calls: int) -> None:
        """A member may be given another call, unless it has as many as it may have."""
        offer = (calls, number)
        if calls < self._in_flight and offer not in self._known:
            self._known.add(offer)
            heapq.heappush(self._offers, offer)

    def least_busy(self, calls_of: Callable[[int], int | None]) -> int | None:
        """The member with the fewest calls, of those the one with the lowest number; None where
        none may be given one. ``calls_of`` says how many a member has now, None where it may not be
        given any."""
        while self._offers:
            calls, number = self._offers[0]
            if calls_of(number) == calls:
                return number
            self._known.discard(heapq.heappop(self._offers))
        return None
