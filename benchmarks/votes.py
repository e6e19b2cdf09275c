"""How long a vote takes: 200 simulated people, five votes a second for a minute, on each store.

    python benchmarks/votes.py [seconds] [votes a second]

Clicks come at drawn times, whatever the store does meanwhile, and eight threads serve them, as a
page's would: an answer's time runs from the click. Every third click comes twice. What was
acknowledged and is not there, or is there twice, is counted at the end. SQLite's file is made in
the current folder, PostgreSQL is started in a temporary one where its binaries are found; both wait
for the disk.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlalign.ballots.store import Store
from tests.ballots import crowd, postgres

PEOPLE = 200


def measure(place: str, seconds: float, rate: float) -> list[str]:
    """The row of a store."""
    store = Store.open(place)
    clicks = round(seconds * rate)
    people = crowd.gather(store, people=PEOPLE, items=clicks, target=2)
    tally = crowd.Tally()
    due = np.sort(np.random.default_rng(0).uniform(0, seconds, size=clicks))
    whole: list[float] = []
    began = time.perf_counter()

    def serve(click: int) -> None:
        crowd.vote_once(store, people[click % PEOPLE], click, 1.0, tally)
        whole.append(time.perf_counter() - began - float(due[click]))

    with ThreadPoolExecutor(8) as pool:
        for click in range(clicks):
            time.sleep(max(began + float(due[click]) - time.perf_counter(), 0.0))
            pool.submit(serve, click)
    lost, doubled = crowd.lost_and_doubled(store, tally)
    store.close()
    times = [crowd.milliseconds(one) for one in (tally.issue_s, tally.vote_s, whole)]
    return [f"{len(tally.seqs)} of {clicks}", *times, str(lost), str(doubled)]


def compare_stores(times: Sequence[str], measure: Callable[[str, float, float], list[str]]) -> None:
    """Prints a row for each store: ``measure`` takes its place, the seconds and votes a second."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    title = f"{PEOPLE} people, {rate:g} votes a second, {seconds:g} s; median / 95 % / largest"
    table = Table("store", "votes", *times, "lost", "doubled", title=title)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        table.add_row("SQLite", *measure(str(Path(folder) / "votes.db"), seconds, rate))
    if postgres.binaries() is None:
        print("no PostgreSQL on this machine")
    else:
        with postgres.temporary_server() as url:
            table.add_row("PostgreSQL", *measure(url, seconds, rate))
    Console(width=120).print(table)


if __name__ == "__main__":
    compare_stores(("next ballot, ms", "vote, ms", "click to done, ms"), measure)
