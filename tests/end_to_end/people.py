"""A run that learns from votes beside simulated people who give them: threads of one process."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from rlalign.alignment.loop import train_local
from rlalign.config import load_run
from rlalign.voting.judges import agreement
from rlalign.voting.serve import Served, open_source, opened, people_of
from rlalign.voting.settings import load_vote
from tests.runs import CONFIGS, quiet


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What became of it."""

    run: Path
    store: Path
    given: int
    """Votes."""
    agreement: float
    """Probability that two of the people choose the same picture of the pairs that they were
    asked."""


def close_the_loop(
    place: Path,
    store: Path,
    *,
    config: str = "tiny_people",
    run: tuple[str, ...] = (),
    vote: tuple[str, ...] = (),
    resume: bool = False,
) -> Loop:
    """Runs a config that learns from votes in a folder beside ``configs/vote_tiny_people.yaml``
    until the run is over; both with overrides."""
    refits = load_run(CONFIGS / f"{config}.yaml").refit is not None
    ballots = f"{'refit.' if refits else ''}preferences.ballots"
    settings = load_run(CONFIGS / f"{config}.yaml", [f"{ballots}.store={store}", *run])
    campaign = load_vote(
        CONFIGS / "vote_tiny_people.yaml", [f"store={store}", f"source.run={place}", *vote]
    )
    over = threading.Event()
    with opened(campaign, open_source(campaign), quiet) as served:
        people = people_of(served)
        thread = threading.Thread(
            target=lambda: people.run(over=lambda: over.is_set() or served.queue.is_over)
        )
        thread.start()
        try:
            train_local(settings, place, resume=resume, on_record=quiet)
        finally:
            over.set()
            thread.join()
        found = agreement(people.judge, differences(served, people.judge))
    return Loop(run=place, store=store, given=people.given, agreement=found)


def differences(served: Served, judge: object) -> list[float]:
    """By how much in utility the pictures of each vote differ."""
    found = []
    for vote in served.store.votes(served.vote.name):
        contents = [served.store.content(uid) or b"" for uid in vote.ballot.shown]
        one, other = judge.utilities(vote.ballot.item.caption, contents)  # type: ignore[attr-defined]
        found.append(float(one - other))
    return found
