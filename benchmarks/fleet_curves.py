"""What the model says up to 10,000 workers: pictures and tables of docs/scaling.md.

A unit here is what benchmarks/gpu.py measured of Stable Diffusion 1.5 on an H100 (LoRA, bfloat16,
guidance): 8 samples of 20 steps take a rollout worker 2.1 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.fleet_costs import costs_of
from benchmarks.fleet_model import efficiency, simulate
from benchmarks.fleet_scenario import Costs, Draws, Network, Scenario

TableOf = tuple[Sequence[str], list[Sequence[str]]]

WORKERS = (16, 64, 256, 512, 1024, 2048, 4096, 10_000)
"""Multiples of 16, so that coordinators have equal parts."""
UNITS_A_WORKER = 4
UNIT_SECONDS = 2.1
SAMPLES = 12e6
"""Bytes of a unit: latents of 21 moments in float16, pictures in bytes."""
MEDIA = 6.3e6
GIGABIT = 1e9 / 8
NODE = Network(rate=25 * GIGABIT, workers_per_node=8)
RESTART = 60.0
"""Seconds that a worker with a model of size takes to start again."""


class Line(NamedTuple):
    """One line of a picture."""

    label: str
    at: Callable[[float], float]
    """x -> y."""
    style: str = "-"
    color: str = ""


def draw(measured: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, TableOf]]:
    """Writes the pictures; gives each one's name and table."""
    costs = costs_of(measured, 10_000)
    yield "coordinator", coordinator(costs, folder)
    yield "weights", weights(costs, folder)
    yield "samples", samples(costs, folder)
    yield "staleness", staleness(costs, folder)
    yield "deaths", deaths(costs, folder)
    yield "tail", tail(costs, folder)


def of(workers: float, **changes: Any) -> Scenario:
    """A fleet of so many with the same work for each: what it makes grows with it."""
    workers = int(workers)
    given: dict[str, Any] = {
        "workers": workers,
        "units": UNITS_A_WORKER * workers,
        "rounds": 1,
        "rollout": Draws(mean=UNIT_SECONDS),
        "reward_workers": max(1, workers // 8),
    }
    return Scenario(**given | changes)


def coordinator(costs: Costs, folder: Path) -> TableOf:
    """How far one event loop goes, by the seconds of a unit; and several."""

    def at(seconds: float, parts: int = 1) -> Callable[[float], float]:
        def value(workers: float) -> float:
            scenario = of(workers, rollout=Draws(mean=seconds), coordinators=parts)
            return efficiency(scenario, costs)

        return value

    lines = list[Line]()
    for number, seconds in enumerate((0.5, 2.1, 8.0, 30.0)):
        lines.append(Line(f"{seconds:g} s a unit", at(seconds), "-", f"C{number}"))
    lines.append(Line("2.1 s, 4 coordinators", at(2.1, 4), "--", "C1"))
    lines.append(Line("2.1 s, 16 coordinators", at(2.1, 16), ":", "C1"))
    return picture(
        folder / "scaling-coordinator.png",
        lines,
        WORKERS,
        x="rollout workers",
        y="share of the rollouts' own rate",
    )


def weights(costs: Costs, folder: Path) -> TableOf:
    """How long a round waits for new weights, pulled and in a tree."""
    sizes = {
        "LoRA, 13 MB": 13e6,
        "SD 1.5, 1.7 GB": 1.7e9,
        "2.6 B, 5.2 GB": 5.2e9,
        "12 B, 24 GB": 24e9,
    }

    def at(size: float, how: str) -> Callable[[float], float]:
        def value(workers: float) -> float:
            chunk = max(NODE.chunk, size / 100) if how == "swarm" else NODE.chunk
            network = replace(NODE, how=how, chunk=chunk)
            scenario = of(workers, units=int(workers), rounds=1, weights=size, network=network)
            return simulate(scenario, Costs(hop=costs.hop)).spread

        return value

    lines = list[Line]()
    for number, (label, size) in enumerate(sizes.items()):
        lines.append(Line(f"{label}, pulled", at(size, "pull"), "-", f"C{number}"))
        lines.append(Line(f"{label}, tree of 2", at(size, "tree"), "--", f"C{number}"))
        if size > NODE.chunk:
            lines.append(Line(f"{label}, swarm", at(size, "swarm"), ":", f"C{number}"))
    return picture(
        folder / "scaling-weights.png",
        lines,
        WORKERS,
        x="rollout workers, 8 a node",
        y="s until the last node has them",
        logs=True,
        digits=1,
    )


def samples(costs: Costs, folder: Path) -> TableOf:
    """The way of samples to rewards and to the learner."""
    quick = Costs(hop=costs.hop)  # a coordinator that is never full

    def link(size: float, rate: float, learners: int) -> Callable[[float], float]:
        network = replace(NODE, rate=rate * GIGABIT)

        def value(workers: float) -> float:
            scenario = of(workers, samples=size, network=network, learners=learners)
            return efficiency(replace(scenario, max_staleness=1, rounds=3), quick)

        return value

    def rewards(count: int, units: int) -> Callable[[float], float]:
        scores = [Draws(mean=0.1)]

        def value(workers: float) -> float:
            scenario = of(workers, rewards=scores, reward_workers=count, units_per_call=units)
            return efficiency(scenario, quick)

        return value

    lines = [
        Line("12 MB a unit, 25 Gbit/s", link(SAMPLES, 25, 1), "-", "C0"),
        Line("12 MB a unit, 100 Gbit/s", link(SAMPLES, 100, 1), "--", "C0"),
        Line("12 MB, 25 Gbit/s, 8 learners by shards", link(SAMPLES, 25, 8), ":", "C0"),
        Line("120 MB a unit, 25 Gbit/s", link(10 * SAMPLES, 25, 1), "-", "C1"),
        Line("4 reward workers of 0.1 s", rewards(4, 1), "-", "C2"),
        Line("64 reward workers of 0.1 s", rewards(64, 1), "-", "C3"),
    ]
    return picture(
        folder / "scaling-samples.png",
        lines,
        WORKERS[:-2],
        x="rollout workers",
        y="share of the rollouts' own rate",
    )


def staleness(costs: Costs, folder: Path) -> TableOf:
    """What rounds ahead buy where an update takes half as long as the rollouts."""
    update = UNITS_A_WORKER * UNIT_SECONDS / 2

    def at(spread: float, every: int) -> Callable[[float], float]:
        def value(ahead: float) -> float:
            scenario = of(
                128,
                rollout=Draws(mean=UNIT_SECONDS, spread=spread),
                update=update,
                max_staleness=int(ahead),
                checkpoint_every=every,
                rounds=16,
            )
            return efficiency(scenario, costs)

        return value

    lines = list[Line]()
    for number, spread in enumerate((0.0, 0.5, 1.0)):
        name = f"spread {spread:g}"
        lines.append(Line(name, at(spread, 0), "-", f"C{number}"))
        lines.append(Line(f"{name}, checkpoint.every 5", at(spread, 5), "--", f"C{number}"))
    return picture(
        folder / "scaling-staleness.png",
        lines,
        (0, 1, 2, 3, 4),
        x="max_staleness",
        y="share of the rollouts' own rate",
        linear=True,
    )


def deaths(costs: Costs, folder: Path) -> TableOf:
    """What deaths cost, by the mean life of a worker."""

    def at(seconds: float, ahead: int) -> Callable[[float], float]:
        def value(hours: float) -> float:
            scenario = of(
                250,
                rollout=Draws(mean=seconds),
                deaths=1 / (3600 * hours),
                restart=RESTART,
                max_staleness=ahead,
                rounds=8,
                seed=1,
            )
            return efficiency(scenario, costs)

        return value

    lines = list[Line]()
    for number, seconds in enumerate((2.1, 30.0, 300.0)):
        lines.append(Line(f"{seconds:g} s a unit", at(seconds, 0), "-", f"C{number}"))
        lines.append(Line(f"{seconds:g} s, one round ahead", at(seconds, 1), "--", f"C{number}"))
    return picture(
        folder / "scaling-deaths.png",
        lines,
        (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        x="mean life of a worker, hours",
        y="share of the rollouts' own rate",
    )


def tail(costs: Costs, folder: Path) -> TableOf:
    """What the end of a synchronous round costs, by units a worker."""

    def at(spread: float, in_flight: int) -> Callable[[float], float]:
        def value(each: float) -> float:
            scenario = of(
                128,
                units=int(128 * each),
                rollout=Draws(mean=UNIT_SECONDS, spread=spread),
                in_flight=in_flight,
                rounds=6,
            )
            return efficiency(scenario, costs)

        return value

    lines = list[Line]()
    for number, spread in enumerate((0.0, 0.3, 0.6, 1.0)):
        lines.append(Line(f"spread {spread:g}", at(spread, 2), "-", f"C{number}"))
        lines.append(Line(f"spread {spread:g}, one at a time", at(spread, 1), "--", f"C{number}"))
    return picture(
        folder / "scaling-tail.png",
        lines,
        (1, 2, 4, 8, 16),
        x="units a worker in a round",
        y="share of the rollouts' own rate",
    )


def picture(
    path: Path,
    lines: Sequence[Line],
    at: Sequence[float],
    *,
    x: str,
    y: str,
    logs: bool = False,
    linear: bool = False,
    digits: int = 2,
) -> TableOf:
    """Draws lines over the same places; returns them as a table."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    rows = list[Sequence[str]]()
    for line in lines:
        values = [line.at(place) for place in at]
        axes.plot(at, values, line.style, color=line.color, lw=1.7, marker=".", label=line.label)
        rows.append([line.label, *(f"{value:.{digits}f}" for value in values)])
    if not linear:
        axes.set_xscale("log")
    axes.set_xticks(at, [f"{place:,g}" for place in at], minor=False)
    axes.minorticks_off()
    if logs:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return [x, *(f"{place:,g}" for place in at)], rows
