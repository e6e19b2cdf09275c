"""What a unit costs the coordinator and the others: seconds of CPU, read off the system's clocks of
threads while the real runtime works.

A round of three units a worker is made in waves, as all rollouts take equally long. Between two
waves nothing happens, so that what the coordinator's event loop has worked from one pause to the
next is the work of known messages:

    pause | order, two calls | answers, scores, a call | answers, scores | the same | gather
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.fleet_real import RealFleet
from benchmarks.fleet_scenario import Draws, Scenario
from rlalign.runtime.pool import Pool
from rlalign.runtime.roles import ROLLOUT

UNITS_A_WORKER = 3
ROUNDS = 3
UNITS_A_SECOND = 50
"""That the coordinator is given at most, so that waves stay apart."""
LEAST_SECONDS = 0.5
PART = 0.3
"""Of a rollout's seconds: what a score takes where the two are told apart."""
IDLE_SECONDS = 2.0
MEMBERS = (64, 500, 2000)
"""Sizes of pools in which the search for a worker is measured."""


def threads(pid: int) -> dict[int, float]:
    """Thread -> seconds that it has run."""
    found = dict[int, float]()
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found[int(folder.name)] = int((folder / "schedstat").read_text().split()[0]) / 1e9
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def _name(pid: int, thread: int) -> str:
    return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()


Clocks = dict[str, dict[int, float]]
"""Kind of process -> thread -> seconds that it has run."""


def passed(before: Clocks, after: Clocks) -> dict[str, float]:
    """Kind of process -> seconds between two readings, of threads that are in both or new."""
    return {
        kind: sum(seconds - before[kind].get(thread, 0.0) for thread, seconds in now.items())
        for kind, now in after.items()
    }


class Meter:
    """The clocks of a fleet's processes."""

    def __init__(self, real: RealFleet) -> None:
        fleet = real.fleet
        self.coordinator: int = ray.get(fleet.coordinator.process_id.remote())  # type: ignore[assignment]
        roles = {role: list(fleet.actors(role).values()) for role in fleet.wanted}
        asked = {
            role: [actor.process_id.remote() for actor in some] for role, some in roles.items()
        }
        pids: Any = {role: ray.get(some) for role, some in asked.items()}
        self.workers: list[int] = pids.pop(ROLLOUT)
        self.rewards: list[int] = [pid for some in pids.values() for pid in some]
        own = psutil.Process()
        others = {child.pid for child in own.children(recursive=True)} | {own.pid}
        self.others = others - {self.coordinator, *self.workers, *self.rewards}
        self.loop = 0

    def find_loop(self, real: RealFleet, scenario: Scenario) -> None:
        """The event loop: of Python's threads but the main one, which works most in a round.
        Ray's own have names of their own."""
        before = threads(self.coordinator)
        real.collect.gather(real.order(scenario, 0))
        after = threads(self.coordinator)
        ours = [
            thread
            for thread in after
            if thread != self.coordinator and _name(self.coordinator, thread).startswith("ray::")
        ]
        self.loop = max(ours, key=lambda thread: after[thread] - before.get(thread, 0.0))

    def of_loop(self) -> float:
        """Seconds that the event loop has run."""
        return threads(self.coordinator)[self.loop]

    def of_all(self) -> Clocks:
        """The clocks of each kind of process; ``beside`` is Ray's own, this one, and what the
        coordinator does off its event loop."""
        pids = {
            "worker": self.workers,
            "reward": self.rewards,
            "beside": [*self.others, self.coordinator],
        }
        found = {
            kind: {thread: seconds for pid in some for thread, seconds in threads(pid).items()}
            for kind, some in pids.items()
        }
        del found["beside"][self.loop]
        return found


def measure(real: RealFleet, workers: int) -> dict[str, float]:
    """Seconds of each message with so many workers: medians of a few rounds."""
    real.shrink(workers)
    rollout = max(LEAST_SECONDS, workers / UNITS_A_SECOND)
    scenario = Scenario(
        workers=workers,
        units=UNITS_A_WORKER * workers,
        rollout=Draws(mean=rollout),
        rewards=[Draws(mean=0.001)],
    )
    meter = Meter(real)
    meter.find_loop(real, scenario)
    idle = _idle(meter)
    rounds = [_waves(real, meter, scenario, idle) for _ in range(ROUNDS)]
    found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}

    # one reward's answer, where answers of rollouts and of rewards come at different moments
    if workers <= 4:
        late = Scenario(
            workers=workers,
            units=workers,
            rollout=Draws(mean=rollout),
            rewards=[Draws(mean=PART * rollout)],
        )
        shares = [_share_of_scores(real, meter, late) for _ in range(2 * ROUNDS)]
        found["share of scores"] = statistics.median(shares)
    found["hop"] = _hop(real)
    found["idle"] = sum(idle.values())
    return found


def _idle(meter: Meter) -> dict[str, float]:
    """Seconds a second that all run without work."""
    loop = meter.of_loop()
    before = meter.of_all()
    time.sleep(IDLE_SECONDS)
    seconds = passed(before, meter.of_all()) | {"loop": meter.of_loop() - loop}
    return {name: value / IDLE_SECONDS for name, value in seconds.items()}


def _waves(
    real: RealFleet, meter: Meter, scenario: Scenario, idle: Mapping[str, float]
) -> dict[str, float]:
    """One round, by waves."""
    workers = scenario.workers
    units = scenario.units
    rollout = scenario.rollout.mean
    all_before = meter.of_all()
    began = time.monotonic()
    at = [meter.of_loop()]
    start = time.monotonic()
    ticket = real.order(scenario, 0)
    for wave in range(UNITS_A_WORKER + 1):
        time.sleep(max(0.0, start + (wave + 0.5) * rollout - time.monotonic()))
        at.append(meter.of_loop())
    gathering = time.thread_time()
    real.collect.gather(ticket)
    gathering = time.thread_time() - gathering
    time.sleep(0.1)
    at.append(meter.of_loop())
    took = time.monotonic() - began
    worked = passed(all_before, meter.of_all())

    # order and two calls a worker; then an answer each with and without a call; then the results
    quiet = idle["loop"] * rollout
    first, second, third, fourth, last = (b - a - quiet for a, b in itertools.pairwise(at))
    answer = (third + fourth) / (2 * workers)
    call = max(second / workers - answer, 0.0)
    found = {
        "order": max(first - 2 * workers * call, 0.0) / units,
        "call": call,
        "answer and score": answer,
        "gather": max(last, 0.0) / units,
        "fetch": gathering / units,
    }
    for kind, seconds in worked.items():
        found[kind] = max(seconds - idle[kind] * took, 0.0) / units
    found["beside"] = max(found["beside"] - found["fetch"], 0.0)
    return found


def _share_of_scores(real: RealFleet, meter: Meter, scenario: Scenario) -> float:
    """What part of an answer's and its score's work is the score's."""
    rollout = scenario.rollout.mean
    start = time.monotonic()
    ticket = real.order(scenario, 0)
    at = []
    for moment in (0.5, 1.0 + PART / 2, 1.0 + 2 * PART):
        time.sleep(max(0.0, start + moment * rollout - time.monotonic()))
        at.append(meter.of_loop())
    real.collect.gather(ticket)
    return (at[2] - at[1]) / (at[2] - at[0])


def _hop(real: RealFleet) -> float:
    """Half of what a call and its answer take that ask for nothing."""
    took = []
    for _ in range(30):
        start = time.monotonic()
        ray.get(real.fleet.coordinator.process_id.remote())
        took.append(time.monotonic() - start)
        time.sleep(0.02)
    return statistics.median(took) / 2


# --- the search for a worker ---------------------------------------------------------------------


class _Answering:
    """An actor that answers at once, without a process."""

    class ping:
        @staticmethod
        async def remote() -> str:
            return "pong"


async def _pool_seconds(members: int, units: int = 200) -> float:
    """Seconds for each unit of a queue in a pool in which everybody is busy."""
    actors: Any = {number: _Answering() for number in range(members)}
    pool = Pool(ROLLOUT, start_seconds=60.0, in_flight=1)
    pool.adopt(actors)
    while pool.state().ready < members:
        await asyncio.sleep(0.01)
    busy = [(await pool.acquire())[0] for _ in range(members)]
    start = time.thread_time()
    waiting = [asyncio.ensure_future(pool.acquire()) for _ in range(units)]
    await asyncio.sleep(0)
    for number in busy[:units]:
        pool.release(number)
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    return (time.thread_time() - start) / units


def search_seconds() -> dict[int, float]:
    """Members of a pool -> seconds of its work for a unit that waits and is given out."""
    return {
        members: min(asyncio.run(_pool_seconds(members, min(members, 200))) for _ in range(3))
        for members in MEMBERS
    }


# --- the machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
