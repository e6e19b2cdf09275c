"""The real runtime under the scenarios of the model: rlalign's coordinator, pools and hand-off,
with workers that sleep and a learner that sleeps."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from benchmarks.fleet_scenario import Scenario
from benchmarks.fleet_sleepers import ROWS, SleepingReward, SleepingRollout, prompts_of
from rlalign.alignment.control import Asked
from rlalign.config import Run, load_run
from rlalign.core.records import Unit, UnitKey, Weights
from rlalign.runtime.actors import RESTART
from rlalign.runtime.roles import ROLLOUT, Role
from rlalign.runtime.training.collect import RemoteCollect
from rlalign.runtime.training.fleet import Fleet

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
REWARD_WORKERS = 4


class SleepingFleet(Fleet):
    """The run's own fleet, with workers that sleep."""

    def _worker(self, role: Role, number: int) -> ActorHandle:
        kind: Any = SleepingRollout if role == ROLLOUT else SleepingReward
        make: Any = ray.remote(num_cpus=0, **RESTART)(kind)
        return make.remote()

    def actors(self, role: Role) -> dict[int, ActorHandle]:
        """Number -> worker."""
        return self._members[role]


class RealFleet:
    """A fleet that plays one scenario after another, each with as many workers as it has or
    fewer."""

    def __init__(self, workers: int) -> None:
        settings = [
            f"runtime.rollout.workers={workers}",
            f"runtime.reward.workers={REWARD_WORKERS}",
            "runtime.rollout.cpus=0",
            "runtime.max_attempts=20",
        ]
        self.run: Run = load_run(CONFIG, settings)
        self.fleet = SleepingFleet(self.run, places_are_cores=False)
        self.wait()
        ray.get(self.fleet.coordinator.begin.remote("modelled"))
        self.collect = RemoteCollect(
            self.run, self.fleet.coordinator, incarnation="modelled", is_main=True, homes=["here"]
        )
        self._round = 0

    def wait(self) -> None:
        """Until every worker answers, and those that are too many are gone."""
        while True:
            standing = self.fleet.reconcile()
            if standing is not None and all(
                pool.ready == self.fleet.size(role) and not pool.lost + pool.starting
                for role, pool in standing.pools.items()
            ):
                return
            time.sleep(0.2)

    def shrink(self, workers: int) -> None:
        """Goes on with fewer rollout workers."""
        self.fleet.scale(Asked(rollout_workers=workers))
        self.wait()

    def end(self) -> None:
        """Kills every actor."""
        self.fleet.end()

    def work(self, scenario: Scenario, number: int) -> list[Unit]:
        """A round's units, which take as long as those of the model."""
        self._round += 1
        seconds = scenario.rollout.round(number, scenario.units).tolist()
        scores = scenario.rewards[0].round(number, scenario.units).tolist()
        return [
            Unit(
                key=UnitKey("train", self._round, index),
                prompts=prompts_of(seconds[index], scores[index]),
                prompt_ids=(0,) * ROWS,
                sample_ids=tuple(range(ROWS)),
                seed=0,
                plan=self.run.plan,
            )
            for index in range(scenario.units)
        ]

    def order(self, scenario: Scenario, number: int) -> int:
        """Orders a round under weights of its own; returns the ticket."""
        work = self.work(scenario, number)
        return self.collect.order(work, Weights(version=self._round, kind="current", tensors={}))

    def play(self, scenario: Scenario) -> tuple[float, ...]:
        """Plays a scenario as ``rlalign.alignment`` does a run; when each round ended, seconds
        from the start."""
        pids = self._process_ids(scenario.kills)
        ends = list[float]()
        tickets = list[int]()
        start = time.monotonic()
        killers = [
            threading.Timer(second, os.kill, (pids[number], signal.SIGKILL))
            for second, number in scenario.kills
        ]
        for killer in killers:
            killer.start()
        ordered = 0
        for number in range(scenario.rounds):
            last = min(number + 1 + scenario.max_staleness, scenario.rounds)
            tickets += [self.order(scenario, ahead) for ahead in range(ordered, last)]
            ordered = max(ordered, last)
            self.collect.gather(tickets[number])
            time.sleep(scenario.update)
            ends.append(time.monotonic() - start)
        for killer in killers:
            killer.cancel()
        self.wait()
        return tuple(ends)

    def _process_ids(self, kills: Sequence[tuple[float, int]]) -> dict[int, int]:
        actors = self.fleet.actors(ROLLOUT)
        numbers = sorted({number for _, number in kills})
        pids: Any = ray.get([actors[number].process_id.remote() for number in numbers])
        return dict(zip(numbers, pids, strict=True))


def restart_seconds(real: RealFleet, times: int = 5) -> list[float]:
    """From a rollout worker's death until it answers the coordinator again."""
    found = []
    for _ in range(times):
        pid = real._process_ids([(0.0, 0)])[0]
        ray_actor: Any = real.fleet.actors(ROLLOUT)[0]
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        while True:
            try:
                ray.get(ray_actor.ping.remote(), timeout=60)
                break
            except RayActorError:
                time.sleep(0.05)
        found.append(time.monotonic() - start)
        real.wait()
    return found


def start_ray() -> None:
    """A Ray of this machine's own, with nothing beside what a run needs."""
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment(None)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
