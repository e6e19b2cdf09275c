"""The cluster: thin actors around Ray-free objects. The only room that imports Ray.

cluster.py      starts a local Ray or joins a cluster; address.py finds it and sees whether it
                answers, temporary.py the
                folder of a local one, token.py the token
roles.py        what an actor is for, and the names of a role
reservation.py  the bundles that a run and a sample reserve
placement.py    which bundle goes where: which node gets what, and what is missing, before anything
                starts
workers.py      the two actors that work: one holds a policy, one a reward; actors.py makes them
pool.py         a group of actors: who is idle, starts, died, came back
engine.py       pieces of work and questions about media on such groups, for a run's units and for
                sampling; rewards.py is how a policy worker asks
weights.py      weights from the learner to the workers, in chunks
words.py        the actor that encodes prompts for all others, and how they ask it
training/       a run: its driver, the coordinator, and who keeps the actors
jobs/           runs as Ray jobs, over the cluster's HTTP interface
sampling.py     the driver of test-time methods; pairs.py reads preference sets by Ray Data
voting.py       pictures for people who vote
gauges.py       what Ray's metrics and its dashboard are told
rllib.py        RLlib's PPO on the environment of rlalign/alignment/environment.py
serving.py      a reward behind HTTP on Ray Serve; rlalign.web is its half without Ray

May import everything below it. To add a role: an actor in workers.py and how it is made in
actors.py, its name in roles.py, what is asked of it in engine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.runtime.began import BEGAN

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.sampling import Sample
    from rlalign.voting.settings import Vote

__all__ = ["BEGAN", "sample_on_ray", "serve_vote_on_ray", "train_on_ray"]


def train_on_ray(
    run: Run,
    folder: Path,
    *,
    resume: bool,
    on_record: Callable[[dict[str, Any]], None],
    address: str | None = None,
) -> None:
    """A run on Ray actors: a local Ray, or the cluster at ``address``. Raises UserError on a user's
    mistake."""
    from rlalign.runtime.training.train import train

    train(run, folder, resume=resume, on_record=on_record, address=address)


def sample_on_ray(
    sample: Sample,
    folder: Path,
    on_record: Callable[[dict[str, Any]], None],
    *,
    address: str | None = None,
) -> dict[str, Any]:
    """A sampling on Ray actors. Raises UserError on a user's mistake, RunFailed with a worker's
    error."""
    from rlalign.runtime.sampling import sample_on_ray as work

    return work(sample, folder, on_record, address=address)


def serve_vote_on_ray(
    vote: Vote,
    say: Callable[[str], None],
    *,
    on_ready: Callable[[str], None],
    address: str | None = None,
) -> None:
    """The page of a campaign, whose pictures Ray actors draw. Raises UserError on a user's mistake,
    RunFailed with a worker's error."""
    from rlalign.runtime.voting import serve_vote_on_ray as work

    work(vote, say, on_ready=on_ready, address=address)
