"""What a discrete-event model is built of: a clock, cores, servers with a queue, shared links.

No process switches and no coroutines: an event is a time and a call. A server that takes one
message after another needs one event a message, so a million of them take seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

Then = Callable[..., None]


class Clock:
    """The time of the model in seconds, and what happens at which moment. Calls of one moment come
    in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Then, tuple[Any, ...]]] = []
        self._asked = 0

    def after(self, seconds: float, then: Then, *args: Any) -> None:
        """Calls ``then`` when the seconds have passed."""
        self._asked += 1
        heapq.heappush(self._heap, (self.now + seconds, self._asked, then, args))

    def run(self) -> None:
        """Until nothing is left to happen."""
        heap = self._heap
        while heap:
            self.now, _, then, args = heapq.heappop(heap)
            then(*args)

    def stop(self) -> None:
        """Forgets what is still to come."""
        self._heap.clear()


class Cores:
    """Processors that several servers share, first come first served. Without a limit, each has one
    of its own."""

    def __init__(self, clock: Clock, count: float = math.inf) -> None:
        self._clock = clock
        self._free = count
        self._waiting: deque[tuple[float, Then, tuple[Any, ...]]] = deque()
        self.seconds = 0.0
        """Worked by all of them."""

    def take(self, seconds: float, then: Then, *args: Any) -> None:
        """Works for so long, then calls."""
        if math.isinf(self._free):
            self.seconds += seconds
            self._clock.after(seconds, then, *args)
            return
        if self._free < 1:
            self._waiting.append((seconds, then, args))
            return
        self._free -= 1
        self._begin(seconds, then, args)

    def _begin(self, seconds: float, then: Then, args: tuple[Any, ...]) -> None:
        self.seconds += seconds
        self._clock.after(seconds, self._end, then, args)

    def _end(self, then: Then, args: tuple[Any, ...]) -> None:
        if self._waiting:
            self._begin(*self._waiting.popleft())
        else:
            self._free += 1
        then(*args)


class Server:
    """Deals with one message after another, in the order in which they come."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._queue: deque[tuple[float, Then, tuple[Any, ...]]] = deque()
        self._works = False
        self.seconds = 0.0
        """It worked so far."""
        self.longest = 0
        """Messages that waited at most at one moment."""

    def take(self, seconds: float, then: Then, *args: Any) -> None:
        """A message that takes so long and then has something done."""
        if self._works:
            self._queue.append((seconds, then, args))
            self.longest = max(self.longest, len(self._queue))
            return
        self._works = True
        self.seconds += seconds
        self._cores.take(seconds, self._done, then, args)

    def _done(self, then: Then, args: tuple[Any, ...]) -> None:
        if self._queue:
            seconds, *others = self._queue.popleft()
            self.seconds += seconds
            self._cores.take(seconds, self._done, *others)
        else:
            self._works = False
        then(*args)


class Link:
    """A link of so many bytes a second that all transfers share evenly, as chunks of several in
    turns do."""

    def __init__(self, clock: Clock, rate: float) -> None:
        self._clock = clock
        self._rate = rate
        self._heap: list[tuple[float, int, Then, tuple[Any, ...]]] = []
        self._given = 0.0
        """Bytes that a transfer would have got that is there since the start."""
        self._seen = 0.0
        self._asked = 0
        self._plan = 0
        self.seconds = 0.0
        """In which something was sent."""

    def send(self, size: float, then: Then, *args: Any) -> None:
        """A transfer of so many bytes."""
        if size <= 0 or math.isinf(self._rate):
            self._clock.after(0.0, then, *args)
            return
        self._advance()
        self._asked += 1
        heapq.heappush(self._heap, (self._given + size, self._asked, then, args))
        self._schedule()

    def _advance(self) -> None:
        """Gives every transfer its share of the time since the last look."""
        passed = self._clock.now - self._seen
        self._seen = self._clock.now
        if self._heap:
            self._given += passed * self._rate / len(self._heap)
            self.seconds += passed

    def _schedule(self) -> None:
        """Plans a look at when the first one is through, in place of earlier plans."""
        self._plan += 1
        if self._heap:
            left = max(self._heap[0][0] - self._given, 0.0)
            self._clock.after(left * len(self._heap) / self._rate, self._look, self._plan)

    def _look(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._advance()
        end = self._heap[0][0]
        self._given = max(self._given, end)  # rounding
        through = list[tuple[Then, tuple[Any, ...]]]()
        while self._heap and self._heap[0][0] <= end:
            _, _, then, args = heapq.heappop(self._heap)
            through.append((then, args))
        self._schedule()
        for then, args in through:
            then(*args)
