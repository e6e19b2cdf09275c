"""The real coordinator, pools and hand-off with workers that sleep: what is left is coordination,
on any machine.

    python benchmarks/simulator.py [most workers] [seconds a unit] [units a worker] [bytes a unit]

Workers are processes of their own that take no CPU: a rollout sleeps and hands over latents of a
given size, a reward sleeps and answers zeros. The learner's side is rlalign's own too; only the
update is a sleep. Ideal is what sleeping alone would take; coordination is the rest of a round.
Efficiency is the units a second of n workers over n times those of one.

What the same calls of the same workers take with nothing of rlalign's around them is measured in
turns with it ("bare Ray"): one asyncio actor that asks for each unit and then for its scores, and
samples that are fetched in one go at the end. It knows no deaths, no timeouts, no versions and no
metrics.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from rlalign.config import Run, load_run
from rlalign.core.records import Unit, UnitKey, Weights
from rlalign.engine.pieces import Rollout
from rlalign.runtime.gauges import shown
from rlalign.runtime.roles import ROLLOUT, Role

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
ROUNDS, WARM = 5, 3
UNITS_A_WORKER, REWARD_WORKERS, REWARD_SECONDS = 4, 4, 0.005
BIG = 26_000_000


class Idler:
    """What the pool and the dashboard ask of an actor."""

    def ping(self) -> str:
        return "pong"


class SleepingRollout(Idler):
    """A rollout that takes ``seconds`` and hands over ``size`` bytes of latents."""

    def __init__(self, seconds: float, size: int) -> None:
        self._seconds, self._latents = seconds, np.ones(size // 2, np.float16)

    @ray.method(num_returns=3)
    def do(self, work: Rollout, tag: Any, *manifests: Any) -> tuple[Any, Any, Any]:
        with shown(f"{work.unit.key} under v{tag[1]}"):
            time.sleep(self._seconds)
        rows = len(work.unit.prompts)
        media = np.zeros((rows, 1, 3, 8, 8), np.uint8)
        return self._latents, {"media": media}, ({"seconds": self._seconds}, "")


class SleepingReward(Idler):
    """A reward that takes REWARD_SECONDS."""

    def score(
        self, media: Any, prompts: Any, unit: str = "", drop: bool = False
    ) -> tuple[Any, float]:
        with shown(f"nothing of {unit}"):
            time.sleep(REWARD_SECONDS)
        return np.zeros(len(prompts), np.float32), REWARD_SECONDS


class Bare:
    """Units given to whoever is free, two at a time, and scored: the calls and nothing else."""

    def __init__(self, rollouts: Sequence[Any], rewards: Sequence[Any]) -> None:
        self._rollouts, self._rewards = rollouts, rewards

    async def round(
        self, units: Sequence[Unit], tag: tuple[str, int]
    ) -> list[tuple[Any, Any, Any]]:
        free, scorers = asyncio.Queue[Any](), asyncio.Queue[Any]()
        for actor in (*self._rollouts, *self._rollouts):
            free.put_nowait(actor)
        for actor in self._rewards:
            scorers.put_nowait(actor)

        async def one(unit: Unit) -> tuple[Any, Any, Any]:
            actor = await free.get()
            latents, media, facts = actor.do.remote(Rollout(unit=unit, version=tag[1]), tag)
            await facts
            free.put_nowait(actor)
            scorer = await scorers.get()
            scores, _ = await scorer.score.remote(media, unit.prompts, str(unit.key))
            scorers.put_nowait(scorer)
            return latents, media, scores

        return await asyncio.gather(*[one(unit) for unit in units])


def fleet_of(run: Run, seconds: float, size: int) -> Any:
    """The run's own fleet, with workers that sleep."""
    from rlalign.runtime.actors import RESTART
    from rlalign.runtime.training.fleet import Fleet

    class SleepingFleet(Fleet):
        def members(self) -> Any:
            return self._members

        def _worker(self, role: Role, number: int) -> Any:
            if role == ROLLOUT:
                kind: Any = ray.remote(num_cpus=0, **RESTART)(SleepingRollout)
                return kind.options(num_cpus=0).remote(seconds, size)
            kind = ray.remote(num_cpus=0, **RESTART)(SleepingReward)
            return kind.remote()

    return SleepingFleet(run, places_are_cores=False)


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    each = int(sys.argv[3]) if len(sys.argv) > 3 else UNITS_A_WORKER
    size = int(sys.argv[4]) if len(sys.argv) > 4 else 2_000
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment(None)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    console, table = (
        Console(width=110),
        Table(
            "workers",
            "units",
            "ideal s",
            "round s",
            "coordination ms",
            "a unit ms",
            "efficiency",
            "bare Ray ms",
        ),
    )
    rates: dict[int, float] = {}
    for workers in [w for w in (1, 2, 4, 8, 16, 32, 64) if w <= most]:
        units = each * workers
        ideal = each * seconds + math.ceil(workers / REWARD_WORKERS) * REWARD_SECONDS
        ours, bare = rounds(workers, units, seconds, size)
        took = statistics.median(ours)
        rates[workers] = units / took
        over = 1000 * (took - ideal)
        efficiency = rates[workers] / (workers * rates[1])
        row = (
            f"{workers}",
            f"{units}",
            f"{ideal:.2f}",
            f"{took:.3f}",
            f"{over:.0f}",
            f"{over / units:.1f}",
            f"{efficiency:.3f}",
            f"{1000 * (statistics.median(bare) - ideal):.0f}",
        )
        table.add_row(*row)
        print("  ".join(row), file=sys.stderr)
    console.print(table)
    for pages, took in hand_off().items():
        whole, after = (1000 * statistics.median(seconds) for seconds in zip(*took, strict=True))
        console.print(
            f"26 MB, {pages}: {whole:.1f} ms from asking a worker until another process has them,"
            f" {after:.1f} ms of it after the worker's answer"
        )
    ray.shutdown()


def rounds(workers: int, units: int, seconds: float, size: int) -> tuple[list[float], list[float]]:
    """Seconds of each round after the first ones, order to samples in hand: rlalign's, and bare
    calls' in between."""
    from rlalign.runtime.training.collect import RemoteCollect

    settings = [
        f"runtime.rollout.workers={workers}",
        f"runtime.reward.workers={REWARD_WORKERS}",
        "runtime.rollout.cpus=0",
    ]
    run = load_run(CONFIG, settings)
    fleet = fleet_of(run, seconds, size)
    while (standing := fleet.reconcile()) is None or standing.pools[ROLLOUT].ready < workers:
        time.sleep(0.5)
    ray.get(fleet.coordinator.begin.remote("simulated"))
    collect = RemoteCollect(
        run, fleet.coordinator, incarnation="simulated", is_main=True, homes=["here"]
    )
    alone: Any = {"num_cpus": 0, "max_concurrency": 1000}
    make: Any = ray.remote(**alone)(Bare)
    members = fleet.members()
    bare = make.remote(
        [*members[ROLLOUT].values()],
        [a for r, some in members.items() if r != ROLLOUT for a in some.values()],
    )
    ours, theirs = list[float](), list[float]()
    for number in range(WARM + ROUNDS):
        work = [unit(run, number, i) for i in range(units)]
        start = time.monotonic()
        collect.gather(collect.order(work, Weights(version=number, kind="current", tensors={})))
        ours.append(time.monotonic() - start)
        start = time.monotonic()
        found: Any = ray.get(bare.round.remote(work, ("current", number)))
        ray.get([ref for latents, media, _ in found for ref in (latents, media)])
        theirs.append(time.monotonic() - start)
    ray.kill(bare)
    fleet.end()
    return ours[WARM:], theirs[WARM:]


def unit(run: Run, number: int, index: int) -> Unit:
    """A unit of four samples."""
    prompts = ("a red circle",) * 4
    key = UnitKey("train", number, index)
    return Unit(
        key=key,
        prompts=prompts,
        prompt_ids=(0,) * 4,
        sample_ids=(0, 1, 2, 3),
        seed=0,
        plan=run.plan,
    )


def hand_off() -> dict[str, list[tuple[float, float]]]:
    """Seconds from asking a worker that is done at once for 26 MB until another process has them in
    hand, and the part of them after the worker has said that it is done.

    Ray frees objects once a second, so the first ones in a row each lie on memory that nobody has
    touched yet, which the system has to provide page by page. From the second round on a run's
    samples lie where earlier ones did. After a pause processes and caches have to be woken as well:
    a call that asks for nothing then takes three times as long.
    """

    class Reader:
        def read(self, array: Any) -> float:
            return float(array[0]) + float(array[-1])

    make: Any = ray.remote(num_cpus=0)(SleepingRollout)
    take: Any = ray.remote(num_cpus=0)(Reader)
    maker, reader = make.remote(0.0, BIG), take.remote()
    run = load_run(CONFIG)

    def once(number: int) -> tuple[float, float]:
        start = time.monotonic()
        work = Rollout(unit=unit(run, 0, number), version=0)
        latents, _, facts = maker.do.remote(work, ("current", 0))
        ray.get(facts)
        done = time.monotonic()
        ray.get(reader.read.remote(latents))
        return time.monotonic() - start, time.monotonic() - done

    once(0)
    in_a_row = [once(number) for number in range(400)]
    paused = []
    for number in range(20):
        time.sleep(0.3)
        paused.append(once(number))
    return {
        "fresh memory (the first 15 in a row)": in_a_row[:15],
        "warm (the last 200 of 400 in a row)": in_a_row[200:],
        "warm, 0.3 s of rest before each": paused[5:],
    }


if __name__ == "__main__":
    main()
