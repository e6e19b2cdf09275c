"""How long a vote takes at the page: 200 people, five votes a second for a minute, over real HTTP.

    python benchmarks/votes_page.py [seconds] [votes a second]

The page is a process of its own on each store, SQLite in the current folder and PostgreSQL in a
temporary one where its binaries are found. Clicks come at drawn times, whatever the page does
meanwhile: a person fetches both pictures, votes, and gets the next ballot with the answer; every
third vote is sent twice. What was acknowledged and is not there, or is there twice, is counted at
the end. People and page share this machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlalign.ballots.store import Store
from tests.ballots import postgres
from tests.ballots.crowd import milliseconds
from tests.web.vote.crowd import click_together, lost_and_doubled
from tests.web.vote.made_desk import Process

PEOPLE = 200


def measure(place: str, secret: Path, seconds: float, rate: float) -> list[str]:
    """The row of a store."""
    clicks = round(seconds * rate)
    due = np.sort(np.random.default_rng(0).uniform(0, seconds, size=clicks))
    page = Process(place, secret, target=clicks)
    page.start()
    try:
        tally = click_together(page.url, PEOPLE, due.tolist())
    finally:
        page.kill()
    store = Store.open(place)
    lost, doubled = lost_and_doubled(store, tally)
    store.close()
    times = [milliseconds(one) for one in (tally.vote_s, tally.click_s)]
    return [f"{len(tally.votes)} of {clicks}", *times, str(lost), str(doubled)]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    rate = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    table = Table(
        "store",
        "votes",
        "vote to answer, ms",
        "click to answer with pictures, ms",
        "lost",
        "doubled",
        title=f"{PEOPLE} people, {rate:g} votes a second, {seconds:g} s; median / 95 % / largest",
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        secret = Path(folder) / "secret"
        table.add_row("SQLite", *measure(str(Path(folder) / "votes.db"), secret, seconds, rate))
        if postgres.binaries() is None:
            print("no PostgreSQL on this machine")
        else:
            with postgres.temporary_server() as url:
                table.add_row("PostgreSQL", *measure(url, secret, seconds, rate))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
