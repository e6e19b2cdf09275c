"""The bundles that a run and a sample reserve: one for each worker."""

from __future__ import annotations

from rlalign.config import Run, RuntimeSettings
from rlalign.config.runtime import Workers
from rlalign.rewards.base import Reward
from rlalign.runtime.placement import Bundle
from rlalign.runtime.roles import DATA, LEARNER, ROLLOUT, Role, reward_role
from rlalign.sampling import Sample


def bundle_of(role: Role, workers: Workers) -> Bundle:
    """What one worker of a role reserves."""
    needs = {"CPU": workers.cpus, "GPU": workers.gpus, **workers.resources}
    return Bundle(
        role=role,
        needs={name: amount for name, amount in needs.items() if amount},
        labels=workers.labels,
    )


def run_bundles(run: Run) -> list[Bundle]:
    """Every worker of a run: learners, a place for Ray Data where that reads, rollouts, rewards
    with their spares."""
    runtime = run.runtime
    found = [bundle_of(LEARNER, runtime.learner)] * runtime.learner.workers
    if run.preferences is not None and run.preferences.reader == "ray":
        found.append(Bundle(role=DATA, needs={"CPU": 1.0}))  # without it, Ray Data waits for ever
    return found + _producers(runtime, run.rewards_for("evaluate"), runtime.reward.spares)


def sample_bundles(sample: Sample) -> list[Bundle]:
    """Every worker of a sampling."""
    return _producers(sample.runtime, sample.rewards_for("evaluate"), spares=0)


def _producers(runtime: RuntimeSettings, rewards: tuple[Reward, ...], spares: int) -> list[Bundle]:
    """Rollouts, and the workers of each reward."""
    found = [bundle_of(ROLLOUT, runtime.rollout)] * runtime.rollout.workers
    for reward in rewards:
        one = bundle_of(reward_role(reward.title), runtime.reward)
        found += [one] * (runtime.reward.workers + spares)
    return found
