"""The parts of the model of a fleet: units, workers, weights on their way, the pools of a
coordinator."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarks.fleet_events import Clock, Link, Server
from benchmarks.fleet_scenario import Costs, Scenario


@dataclass(eq=False, slots=True)
class Unit:
    """A unit of a round."""

    part: Part
    version: int
    """Of the weights that it is made under."""
    seconds: float
    scores: list[float]
    """Seconds of each reward."""
    left: int
    """Rewards that have not answered."""
    attempts: int = 1


@dataclass(eq=False, slots=True)
class Part:
    """A coordinator's part of a round."""

    coordinator: Coordinator
    size: int
    finished: int = 0
    taken: int = 0
    asks: bool = False
    """The learner waits for an answer."""


@dataclass(eq=False, slots=True)
class Worker:
    """A rollout worker."""

    number: int
    node: int
    calls: int = 0
    """That the coordinator has given it and was not answered."""
    ready: bool = True
    """As far as the coordinator knows."""
    alive: bool = True
    life: int = 0
    """How often it died: who is called in one life does not answer in the next."""
    queue: deque[Unit] = field(default_factory=deque)
    at_work: Unit | None = None
    since: float = 0.0
    worked: float = 0.0


class Broadcast:
    """Versions of the weights on their way to the nodes."""

    def __init__(self, clock: Clock, scenario: Scenario) -> None:
        self._clock = clock
        self._network = scenario.network
        self._size = scenario.weights
        whole = self._network.how != "swarm"
        self._chunks = 1 if whole else max(1, math.ceil(self._size / self._network.chunk))
        self._links: dict[int, Link] = {}
        self._has: dict[tuple[int, int], list[int]] = {}
        """(version, chunk) -> nodes that have it; -1 is the learner's."""
        self._missing: dict[tuple[int, int], list[int]] = {}
        """(version, node) -> chunks that it has not asked for, or an empty list."""
        self._there: set[tuple[int, int]] = set()
        """(version, node) where all of it is."""
        self._waiting: dict[tuple[int, int], list[Worker]] = {}
        self._published: dict[int, float] = {}
        self._draw = np.random.default_rng(scenario.seed)
        self.spread = 0.0
        """Seconds from the publication until the last node had them, at most."""

    def publish(self, version: int) -> None:
        """The learner's node has a new version."""
        self._has |= {(version, chunk): [-1] for chunk in range(self._chunks)}
        self._published[version] = self._clock.now

    def there(self, version: int, worker: Worker, then: Callable[[Worker], None]) -> bool:
        """Whether a worker's node has a version; where not, the worker is called when it has."""
        key = (version, worker.node)
        if self._size <= 0 or math.isinf(self._network.rate) or key in self._there:
            return True
        if key in self._waiting:
            self._waiting[key].append(worker)
            return False
        self._waiting[key] = [worker]
        if self._network.how == "tree":
            left = self._published[version] + self.in_tree(worker.node) - self._clock.now
            self._clock.after(max(left, 0.0), self._arrive, key, then)
        else:
            self._missing[key] = self._draw.permutation(self._chunks).tolist()
            self._pull(key, then)
        return False

    def _pull(self, key: tuple[int, int], then: Callable[[Worker], None]) -> None:
        """Asks for the next chunk: one of those that have it, chosen blindly."""
        chunk = self._missing[key].pop()
        holders = self._has[key[0], chunk]
        source = holders[int(self._draw.integers(len(holders)))]
        if source not in self._links:
            self._links[source] = Link(self._clock, self._network.rate)
        self._links[source].send(self._size / self._chunks, self._take, key, chunk, then)

    def _take(self, key: tuple[int, int], chunk: int, then: Callable[[Worker], None]) -> None:
        self._has[key[0], chunk].append(key[1])
        if self._missing[key]:
            self._pull(key, then)
        else:
            self._arrive(key, then)

    def in_tree(self, node: int) -> float:
        """Seconds until a node of the tree has all chunks: they follow one another on the way."""
        net = self._network
        depth = 1
        first = 0
        width = net.fanout
        while node >= first + width:
            first += width
            width *= net.fanout
            depth += 1
        return net.fanout * (self._size + (depth - 1) * min(net.chunk, self._size)) / net.rate

    def _arrive(self, key: tuple[int, int], then: Callable[[Worker], None]) -> None:
        self._there.add(key)
        self.spread = max(self.spread, self._clock.now - self._published[key[0]])
        for worker in self._waiting.pop(key):
            then(worker)


class Host(Protocol):
    """What a coordinator needs of the fleet."""

    scenario: Scenario
    costs: Costs

    def send(self, unit: Unit, worker: Worker) -> None:
        """A call on its way to a worker."""
        ...

    def score(
        self, seconds: float, then: Callable[..., None], title: int, units: list[Unit]
    ) -> None:
        """A call on its way to a reward worker, and back."""
        ...

    def gather(self, part: Part) -> None:
        """A unit of the part is finished."""
        ...

    def note_retry(self, unit: Unit) -> None:
        """A unit is given out again."""
        ...


class Coordinator:
    """The pools of one coordinator, and its event loop as a server."""

    def __init__(
        self, host: Host, server: Server, workers: Mapping[int, Worker], reward_workers: int
    ) -> None:
        self._host = host
        self.server = server
        self._workers = workers
        self._call = host.costs.call + host.costs.member * len(workers)
        self._in_flight = host.scenario.in_flight
        self._waiting: deque[Unit] = deque()
        self._free = [(0, number) for number in workers]
        """(calls, number) as they were at some moment; what is not so any more is passed over."""
        heapq.heapify(self._free)
        self._idle = [reward_workers] * len(host.scenario.rewards)
        self._asked: list[deque[Unit]] = [deque() for _ in host.scenario.rewards]
        self.scored = 0.0
        """Seconds of all its reward workers."""

    # --- rollouts --------------------------------------------------------------------------------

    def order(self, units: Sequence[Unit]) -> None:
        """Units of a new order."""
        self._waiting.extend(units)
        self._serve()

    def _serve(self) -> None:
        free = self._free
        while self._waiting and free:
            calls, number = heapq.heappop(free)
            worker = self._workers[number]
            if not worker.ready or calls != worker.calls or calls >= self._in_flight:
                continue
            worker.calls += 1
            heapq.heappush(free, (worker.calls, number))
            self.server.take(self._call, self._host.send, self._waiting.popleft(), worker)

    def answered(self, unit: Unit, worker: Worker) -> None:
        """A rollout is there: the worker is free, the rewards are asked."""
        self._release(worker)
        for title, asked in enumerate(self._asked):
            asked.append(unit)
            self._serve_reward(title)

    def lost(self, unit: Unit, worker: Worker) -> None:
        """A call's worker has died: the unit waits again, behind all others."""
        worker.ready = worker.ready and worker.alive
        unit.attempts += 1
        self._host.note_retry(unit)
        self._waiting.append(unit)
        self._release(worker)

    def back(self, worker: Worker) -> None:
        """A worker answers again."""
        worker.ready = True
        heapq.heappush(self._free, (worker.calls, worker.number))
        self._serve()

    def _release(self, worker: Worker) -> None:
        worker.calls -= 1
        heapq.heappush(self._free, (worker.calls, worker.number))
        self._serve()

    # --- rewards ---------------------------------------------------------------------------------

    def _serve_reward(self, title: int) -> None:
        asked = self._asked[title]
        scenario = self._host.scenario
        while asked and self._idle[title]:
            self._idle[title] -= 1
            units = [asked.popleft() for _ in range(min(len(asked), scenario.units_per_call))]
            seconds = sum(unit.scores[title] for unit in units)
            self.scored += seconds
            # samples come when the worker has nothing else to do
            seconds += len(units) * scenario.media / scenario.network.rate
            self._host.score(seconds, self._scored, title, units)

    def _scored(self, title: int, units: Sequence[Unit]) -> None:
        self._idle[title] += 1
        self._serve_reward(title)
        for unit in units:
            unit.left -= 1
            if not unit.left:
                unit.part.finished += 1
                self._host.gather(unit.part)
