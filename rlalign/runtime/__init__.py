"""The cluster: thin actors around Ray-free objects. The only room that imports Ray.

cluster.py      starts a local Ray or joins a cluster
placement.py    what a run reserves, which node gets what, and what is missing, before anything starts
workers.py      the rollout and the reward actor
pool.py         a group of actors: who is idle, starts, died, came back (RLlib's FaultTolerantActorManager inside)
coordinator.py  one asyncio actor: which unit is where, tries, versions; holds references and small facts only
production.py   a unit's way through the pools, and what is counted on it
collect.py      the learner's side of the coordinator: rlalign.loop's Collect
train.py        the driver: runs the learner under Ray Train; fleet.py creates and owns the actors,
                supervisor.py keeps them as wanted, scaling.py decides how many where that is automatic
sample.py       test-time methods on the same pools
gauges.py       what Ray's metrics and its dashboard are told
rllib.py        RLlib's PPO on the environment of rlalign/environment.py
serve.py        a reward behind HTTP on Ray Serve; http_server.py is its half without Ray
jobs.py         runs as Ray jobs, over the cluster's HTTP interface; pack.py gathers what a job needs

May import everything below it. To add a role: an actor in workers.py, a pool for it in train.py, a call in coordinator.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.runtime.began import BEGAN

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.sample import Sample

__all__ = ["BEGAN", "sample_on_ray", "train_on_ray"]


def train_on_ray(
    run: Run, folder: Path, *, resume: bool, on_record: Callable[[dict[str, Any]], None], address: str | None = None
) -> None:
    """A run on Ray actors: a local Ray, or the cluster at ``address``. Raises UserError on a user's mistake."""
    from rlalign.runtime.train import train

    train(run, folder, resume=resume, on_record=on_record, address=address)


def sample_on_ray(
    sample: Sample, folder: Path, on_record: Callable[[dict[str, Any]], None], *, address: str | None = None
) -> dict[str, Any]:
    """A sampling on Ray actors. Raises UserError on a user's mistake, RunFailed with a worker's error."""
    from rlalign.runtime.sample import sample_on_ray as work

    return work(sample, folder, on_record, address=address)
