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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.votes import PEOPLE, compare_stores
from rlalign.ballots.store import Store
from tests.ballots.crowd import milliseconds
from tests.web.vote.crowd import click_together, lost_and_doubled
from tests.web.vote.made_desk import Process


def measure(place: str, seconds: float, rate: float) -> list[str]:
    """The row of a store."""
    clicks = round(seconds * rate)
    due = np.sort(np.random.default_rng(0).uniform(0, seconds, size=clicks))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        page = Process(place, Path(folder) / "secret", target=clicks)
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


if __name__ == "__main__":
    compare_stores(("vote to answer, ms", "click to answer with pictures, ms"), measure)
