"""Scaling to 10,000 workers: a model of the runtime, fed by what its messages cost, checked against
the real one up to 64 workers.

    python benchmarks/fleet.py measure     what messages cost the real coordinator and the others
    python benchmarks/fleet.py validate    the same scenarios in the real runtime and in the model
    python benchmarks/fleet.py curves      the model up to 10,000 workers

Several words share one Ray, none at all means all three. The first two write ``fleet.json``, the
last one the pictures and tables of docs/scaling.md. Workers are processes that sleep; on two cores
64 of them fill the machine where units are short, and so does the model, which is told of the
cores.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from benchmarks.fleet_costs import FILE, SIZES, cores_of, costs_of, load, played
from benchmarks.fleet_model import simulate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
COMMANDS = ("measure", "validate", "curves")


def main() -> None:
    words = sys.argv[1:] or list(COMMANDS)
    if not set(words) <= set(COMMANDS):
        sys.exit(f"fleet.py takes {', '.join(COMMANDS)}; got {' '.join(words)}")
    if {"measure", "validate"} & set(words):
        observe(measures="measure" in words, plays="validate" in words)
    measured = load()
    if "measure" in words:
        show("costs", *costs_table(measured))
    if "validate" in words:
        show("validation", *validation_table(measured))
    if "curves" in words:
        from benchmarks import fleet_curves

        for name, table in fleet_curves.draw(measured, PAGE.parent / "images"):
            show(name, *table)


def observe(*, measures: bool, plays: bool) -> None:
    """Writes what the real runtime takes, from the largest fleet down to one worker: processes
    start once."""
    import ray

    from benchmarks import fleet_measure
    from benchmarks.fleet_real import RealFleet, restart_seconds, start_ray

    found: dict[str, Any] = {} if measures else load()
    if measures:
        found = {"machine": fleet_measure.machine(), "search": fleet_measure.search_seconds()}
        found["workers"] = {}
    start_ray()
    real = RealFleet(max(SIZES))
    if measures:
        found["restart"] = statistics.median(restart_seconds(real))
    if plays:
        found["played"] = []
    for workers in sorted(SIZES, reverse=True):
        if measures:
            found["workers"][str(workers)] = fleet_measure.measure(real, workers)
        real.shrink(workers)
        for title, scenario in played_here(found, workers).items() if plays else ():
            ends = real.play(scenario)
            found["played"].append({"title": title, "workers": workers, "ends": ends})
            print(f"{workers} workers, {title}: {ends[-1]:.2f} s", file=sys.stderr)
    real.end()
    ray.shutdown()
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def played_here(measured: Mapping[str, Any], workers: int) -> Mapping[str, Any]:
    """The scenarios on the machine of the measurements."""
    cores = cores_of(measured, workers)
    return played(workers, restart=measured["restart"], cores=cores)


def modelled(measured: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[float, ...]:
    """When the model ends the rounds of a scenario that the real runtime has played."""
    scenario = played_here(measured, one["workers"])[one["title"]]
    return simulate(scenario, costs_of(measured, one["workers"])).rounds


# --- tables -------------------------------------------------------------------------------------


def costs_table(measured: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Milliseconds of each message, by size of the fleet."""
    kinds = {
        "order": "order",
        "call": "call",
        "answer and score": "answer, score",
        "gather": "gather",
    }
    others = {"worker": "worker", "reward": "reward", "fetch": "learner", "beside": "Ray beside"}
    rows = []
    for size, one in sorted(measured["workers"].items(), key=lambda item: int(item[0])):
        spent = [one[kind] for kind in kinds]
        rest = [one[kind] for kind in others]
        cells = [*spent, sum(spent), *rest, one["hop"]]
        rows.append([size, *(f"{1000 * cell:.2f}" for cell in cells)])
    head = ["workers", *kinds.values(), "coordinator, a unit", *others.values(), "one way"]
    return head, rows


def validation_table(measured: Mapping[str, Any]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Seconds of each scenario in the real runtime and in the model."""
    rows = []
    for one in sorted(measured["played"], key=lambda one: (one["title"], one["workers"])):
        real = one["ends"][-1]
        model = modelled(measured, one)[-1]
        error = f"{100 * (model / real - 1):+.1f} %"
        rows.append([one["title"], f"{one['workers']}", f"{real:.2f}", f"{model:.2f}", error])
    return ["scenario", "workers", "real s", "model s", "error"], rows


def show(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, and puts it into the page where the page has a place for it."""
    table = Table(*head, title=name)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    text = PAGE.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = place.sub(lambda found: found[1] + "\n".join([*lines, found[2]]), text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
