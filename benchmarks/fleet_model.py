"""A model of a run on a fleet, event by event: who does what for how long, and who waits for whom.

    learner --order--> coordinator --call--> rollout workers --answer--> coordinator
       ^                  |  ^                     ^                        |
       |    gather        |  +-------score--- reward workers <-----ask------+
       +------------------+                        |
       +--weights--> nodes -----------------------/

It follows ``rlalign.runtime``: rounds are ordered ahead up to ``max_staleness`` and not across a
checkpoint; units go to the least busy worker, two at a time; weights travel once to a node; results
go to the learner in eighths of a round; a unit whose worker dies goes to the end of the queue. The
coordinator is one server: a message takes it the seconds in ``Costs``, which are measured
(benchmarks/fleet.py). Rollouts, rewards and updates take no core of the coordinator's machine
unless ``cores`` says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.fleet_events import Clock, Cores, Link, Server
from benchmarks.fleet_parts import Broadcast, Coordinator, Part, Unit, Worker
from benchmarks.fleet_scenario import Costs, Outcome, Scenario


def simulate(scenario: Scenario, costs: Costs) -> Outcome:
    """Plays a scenario to its end."""
    return Fleet(scenario, costs).run()


def efficiency(scenario: Scenario, costs: Costs) -> float:
    """Units a second over what the rollout workers could make if they never waited."""
    return simulate(scenario, costs).use["rollouts"]


class Fleet:
    """All of it; what happens at workers, and the learner."""

    def __init__(self, scenario: Scenario, costs: Costs) -> None:
        self.scenario = scenario
        self.costs = costs
        self._clock = Clock()
        self._cores = Cores(self._clock, scenario.cores)
        self._weights = Broadcast(self._clock, scenario)
        self._in = Link(self._clock, scenario.network.rate * scenario.learners)

        # workers are dealt out to coordinators
        per_node = scenario.network.workers_per_node
        self._workers = [Worker(number=n, node=n // per_node) for n in range(scenario.workers)]
        parts = scenario.coordinators
        self._coordinators = [
            Coordinator(
                self,
                Server(self._cores),
                {worker.number: worker for worker in self._workers[part::parts]},
                max(1, scenario.reward_workers // parts),
            )
            for part in range(parts)
        ]

        # the learner's
        self._orders: deque[list[Part]] = deque()
        self._ordered = 0
        self._done: list[float] = []
        self._missing = 0
        """Answers that it waits for."""

        # what is told of it
        self._retries = 0
        self._attempts = 1
        self._wasted = 0.0
        self._chance = np.random.default_rng((scenario.seed, 1))

    def run(self) -> Outcome:
        """Plays it."""
        scenario = self.scenario
        for second, number in scenario.kills:
            self._clock.after(second, self._kill, self._workers[number])
        if scenario.deaths:
            self._die_by_chance(None)
        self._begin_round()
        self._clock.run()
        return Outcome(
            rounds=tuple(self._done),
            use=self._use(self._done[-1]),
            retries=self._retries,
            attempts=self._attempts,
            wasted=self._wasted,
            spread=self._weights.spread,
        )

    def _use(self, seconds: float) -> dict[str, float]:
        scenario = self.scenario
        scored = sum(c.scored for c in self._coordinators)
        scorers = len(self._coordinators) * max(
            1, scenario.reward_workers // len(self._coordinators)
        )
        return {
            "coordinator": max(c.server.seconds for c in self._coordinators) / seconds,
            "rollouts": sum(w.worked for w in self._workers) / seconds / scenario.workers,
            "rewards": scored / (seconds * scorers * len(scenario.rewards)),
            "learner": scenario.update * scenario.rounds / seconds,
            "learner's link": self._in.seconds / seconds,
            "cores": self._cores.seconds / seconds / scenario.cores,
        }

    # --- the learner -----------------------------------------------------------------------------

    def _begin_round(self) -> None:
        """Orders every round that may start under the current weights, then gathers the next."""
        scenario = self.scenario
        done = len(self._done)
        last = min(done + 1 + scenario.max_staleness, scenario.rounds)
        if scenario.checkpoint_every:
            last = min(last, (done // scenario.checkpoint_every + 1) * scenario.checkpoint_every)
        numbers = range(self._ordered, last)
        self._ordered = max(self._ordered, last)
        if not numbers:
            self._gather_next()
            return
        self._weights.publish(done)
        self._missing = len(numbers) * len(self._coordinators)
        for number in numbers:
            parts = list[Part]()
            for part, units in self._deal(number, version=done):
                parts.append(part)
                self._clock.after(self.costs.hop, self._order, part, units)
            self._orders.append(parts)

    def _deal(self, number: int, *, version: int) -> Iterator[tuple[Part, list[Unit]]]:
        """Each coordinator's part of a round."""
        scenario = self.scenario
        count = scenario.units
        seconds = scenario.rollout.round(number, count).tolist()
        scores = np.array([one.round(number, count) for one in scenario.rewards]).T.tolist()
        for place, coordinator in enumerate(self._coordinators):
            own = range(place, count, len(self._coordinators))
            part = Part(coordinator=coordinator, size=len(own))
            rewards = len(scenario.rewards)
            yield part, [Unit(part, version, seconds[i], scores[i], rewards) for i in own]

    def _order(self, part: Part, units: list[Unit]) -> None:
        server = part.coordinator.server
        server.take(self.costs.order * len(units), self._take_order, part, units)

    def _take_order(self, part: Part, units: list[Unit]) -> None:
        self._clock.after(self.costs.hop, self._hear_of_order)
        part.coordinator.order(units)

    def _hear_of_order(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._gather_next()

    def _gather_next(self) -> None:
        parts = self._orders[0]
        self._missing = len(parts)
        for part in parts:
            self._clock.after(self.costs.hop, self._ask, part)

    def _ask(self, part: Part) -> None:
        part.asks = True
        self.gather(part)

    def gather(self, part: Part) -> None:
        """Answers the learner where it asks and enough is there."""
        enough = min(part.taken + max(1, part.size // 8), part.size)
        if not part.asks or part.finished < enough:
            return
        part.asks = False
        count = part.finished - part.taken
        part.taken = part.finished
        part.coordinator.server.take(self.costs.gather * count, self._fetch, part, count)

    def _fetch(self, part: Part, count: int) -> None:
        size = self.scenario.samples * count
        work = self.costs.fetch * count
        take = self._cores.take
        self._clock.after(self.costs.hop, self._in.send, size, take, work, self._fetched, part)

    def _fetched(self, part: Part) -> None:
        if part.taken < part.size:
            self._clock.after(self.costs.hop, self._ask, part)
            return
        self._missing -= 1
        if not self._missing:
            self._orders.popleft()
            self._clock.after(self.scenario.update, self._end_round)

    def _end_round(self) -> None:
        self._done.append(self._clock.now)
        if len(self._done) == self.scenario.rounds:
            self._clock.stop()
        else:
            self._begin_round()

    # --- workers ---------------------------------------------------------------------------------

    def send(self, unit: Unit, worker: Worker) -> None:
        """A call on its way to a worker."""
        self._cores.take(self.costs.beside, _nothing)
        self._clock.after(self.costs.hop, self._receive, unit, worker, worker.life)

    def _receive(self, unit: Unit, worker: Worker, life: int) -> None:
        if worker.life != life or not worker.alive:
            self._report_loss(unit, worker)
            return
        worker.queue.append(unit)
        # a call that waits behind another one has its weights fetched meanwhile
        self._weights.there(unit.version, worker, self._begin)
        self._begin(worker)

    def _begin(self, worker: Worker) -> None:
        """Takes the next unit, where there is one and its weights are there."""
        if worker.at_work is not None or not worker.queue:
            return
        unit = worker.queue[0]
        if not self._weights.there(unit.version, worker, self._begin):
            return
        worker.queue.popleft()
        worker.at_work = unit
        worker.since = self._clock.now
        self._cores.take(self.costs.worker, self._roll_out, unit, worker, worker.life)

    def _roll_out(self, unit: Unit, worker: Worker, life: int) -> None:
        self._clock.after(unit.seconds, self._finish, unit, worker, life)

    def _finish(self, unit: Unit, worker: Worker, life: int) -> None:
        if worker.life != life:
            return
        worker.at_work = None
        worker.worked += unit.seconds
        self._tell(self.costs.hop, unit.part.coordinator.answered, unit, worker)
        self._begin(worker)

    def _tell(self, seconds: float, then: Callable[..., None], unit: Unit, worker: Worker) -> None:
        """The unit's coordinator hears of it after so long, and deals with it when it can."""
        take = unit.part.coordinator.server.take
        self._clock.after(seconds, take, self.costs.answer, then, unit, worker)

    def score(
        self, seconds: float, then: Callable[..., None], title: int, units: list[Unit]
    ) -> None:
        """A call of a reward worker, there and back."""
        costs = self.costs
        take = units[0].part.coordinator.server.take
        answer = (take, costs.score * len(units), then, title, units)
        work = (self._clock.after, seconds + costs.hop, *answer)
        self._clock.after(costs.hop, self._cores.take, costs.reward, *work)

    # --- deaths ----------------------------------------------------------------------------------

    def note_retry(self, unit: Unit) -> None:
        """Counts it."""
        self._retries += 1
        self._attempts = max(self._attempts, unit.attempts)

    def _die_by_chance(self, worker: Worker | None) -> None:
        """Kills one, and draws who is next and when."""
        if worker is not None:
            self._kill(worker)
        wait = self._chance.exponential(1.0 / (self.scenario.deaths * len(self._workers)))
        victim = self._workers[int(self._chance.integers(len(self._workers)))]
        self._clock.after(wait, self._die_by_chance, victim)

    def _kill(self, worker: Worker) -> None:
        """One that is away already does not die once more."""
        if not worker.alive:
            return
        worker.alive = False
        worker.life += 1
        lost = list(worker.queue)
        worker.queue.clear()
        if worker.at_work is not None:
            lost.insert(0, worker.at_work)
            worker.at_work = None
            self._wasted += self._clock.now - worker.since
        for unit in lost:
            self._report_loss(unit, worker)
        self._clock.after(self.scenario.restart, self._restart, worker)

    def _report_loss(self, unit: Unit, worker: Worker) -> None:
        self._tell(self.scenario.notice, unit.part.coordinator.lost, unit, worker)

    def _restart(self, worker: Worker) -> None:
        worker.alive = True
        coordinator = self._coordinators[worker.number % len(self._coordinators)]
        coordinator.server.take(self.costs.answer, coordinator.back, worker)


def _nothing() -> None:
    """Work that nobody waits for."""
