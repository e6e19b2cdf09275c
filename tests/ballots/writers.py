"""Processes that vote until they are killed.

They are forked from a server that has imported the store and nothing else, so that each starts in
milliseconds and holds no lock of the tests' own threads.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer
from rlalign.ballots.store import Store

KEEP_S = 100.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.ballots.writers"])


def votes_before_death(
    place: str, campaign: str, annotators: Sequence[str], now: float, *, count: int, mark: str
) -> list[tuple[str, str]]:
    """(ballot, nonce) of the votes that a process saw recorded before it was killed by SIGKILL:
    ``count`` or some more, or all that it could give. Nonces begin with ``mark``."""
    ours, theirs = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(
        target=_vote, args=(theirs, place, campaign, list(annotators), now, mark)
    )
    process.start()
    theirs.close()
    acknowledged = []
    try:
        while len(acknowledged) < count:
            acknowledged.append(ours.recv())
    except EOFError:  # nothing was left to vote on
        pass
    process.kill()
    process.join()

    # what it said before its death counts too
    try:
        while True:
            acknowledged.append(ours.recv())
    except EOFError:
        return acknowledged


def _vote(
    pipe: Connection, place: str, campaign: str, annotators: Sequence[str], now: float, mark: str
) -> None:
    store = Store.open(place)
    waiting = list(annotators)
    while waiting:
        who = waiting.pop(0)
        ballot = store.issue(campaign, who, now, Deal(), keep_s=KEEP_S)
        if ballot is not None:
            nonce = f"{mark} {ballot.number}"
            receipt = store.vote(who, ballot.id, Answer(nonce=nonce, choice="left"), now)
            assert receipt.outcome == "recorded"
            pipe.send((ballot.id, nonce))
            waiting.append(who)
