"""What was measured of the real runtime, as the model is told it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.fleet_scenario import Costs, Draws, Scenario

FILE = Path(__file__).with_name("fleet.json")
"""``python benchmarks/fleet.py measure validate`` writes it."""
UNITS_A_SECOND = 120
"""That two cores carry with room to spare: rollouts of many workers are not shorter."""
SIZES = (1, 4, 16, 64)
"""Rollout workers of the fleets that are measured and played."""


def load() -> dict[str, Any]:
    """The measurements; Costs are made of them by ``costs_of``."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def costs_of(measured: Mapping[str, Any], workers: int) -> Costs:
    """Of a fleet of so many rollout workers. Between two sizes that were measured they lie in
    proportion to the logarithm; beyond the largest they stay, but for the search for a worker."""
    cost = _between(measured["workers"], workers)
    shares = [
        one["share of scores"] for one in measured["workers"].values() if "share of scores" in one
    ]
    share = statistics.mean(shares)

    # a pool is searched member by member; as far as the measured fleet's it is in its calls
    search = {int(size): seconds for size, seconds in measured["search"].items()}
    most, least = max(search), min(search)
    member = max(0.0, (search[most] - search[least]) / (most - least))
    included = member * min(workers, max(int(size) for size in measured["workers"]))
    return Costs(
        order=cost["order"],
        call=max(0.0, cost["call"] - included),
        member=member,
        answer=(1 - share) * cost["answer and score"],
        score=share * cost["answer and score"],
        gather=cost["gather"],
        hop=cost["hop"],
        worker=cost["worker"],
        reward=cost["reward"],
        fetch=cost["fetch"],
        beside=cost["beside"],
    )


def _between(by_workers: Mapping[str, Mapping[str, float]], workers: int) -> dict[str, float]:
    sizes = sorted(int(size) for size in by_workers)
    below = max([size for size in sizes if size <= workers], default=sizes[0])
    above = min([size for size in sizes if size >= workers], default=sizes[-1])
    part = 0.0
    if above > below:
        part = math.log(workers / below) / math.log(above / below)
    low, high = by_workers[str(below)], by_workers[str(above)]
    return {name: low[name] + part * (high[name] - low[name]) for name in low if name in high}


def cores_of(measured: Mapping[str, Any], workers: int) -> float:
    """The machine's, but for what its processes take when nothing is to be done."""
    return measured["machine"]["cores"] - _between(measured["workers"], workers)["idle"]


def played(workers: int, *, restart: float, cores: float) -> dict[str, Scenario]:
    """The scenarios that both the real runtime and the model play: title -> scenario."""
    common: dict[str, Any] = {
        "workers": workers,
        "rewards": [Draws(mean=0.01)],
        "update": 0.3,
        "restart": restart,
        "cores": cores,
    }

    def scenario(units: int, rollout: Draws, **own: Any) -> Scenario:
        return Scenario(units=units * workers, rollout=rollout, **{**common, **own})

    short = max(0.2, workers / UNITS_A_SECOND)
    tail = Draws(mean=0.4, spread=0.8, seed=1)
    # two of many die amid their units; more at once would start on all cores
    victims = 1 if workers < 32 else 2
    kills = [(1.15 + 2.4 * place, 8 * place) for place in range(victims)]
    return {
        "1 s each": scenario(2, Draws(mean=1.0)),
        "short units": scenario(8, Draws(mean=short)),
        "heavy tail": scenario(6, tail, rewards=[Draws(mean=0.02, spread=0.8, seed=2)]),
        "heavy tail, one round ahead": scenario(6, tail, max_staleness=1, update=1.2),
        "deaths": scenario(6, Draws(mean=0.5), kills=kills),
    }
