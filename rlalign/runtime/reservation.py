"""The bundles that a run and a sample reserve: one for each worker."""

from __future__ import annotations

from typing import Any

from rlalign.config import Run, RuntimeSettings
from rlalign.config.runtime import Reserved
from rlalign.rewards.base import Reward
from rlalign.runtime.placement import Bundle
from rlalign.runtime.roles import DATA, ENCODER, LEARNER, ROLLOUT, Role, reward_role
from rlalign.sampling import Sample


def bundle_of(role: Role, workers: Reserved) -> Bundle:
    """What one worker of a role reserves."""
    needs = {"CPU": workers.cpus, "GPU": workers.gpus, **workers.resources}
    return Bundle(
        role=role,
        needs={name: amount for name, amount in needs.items() if amount},
        labels=workers.labels,
    )


def run_bundles(run: Run) -> list[Bundle]:
    """Every worker of a run: learners, a place for Ray Data where that reads, rollouts, rewards
    with their spares, the encoder where there is one."""
    runtime = run.runtime
    found = [bundle_of(LEARNER, runtime.learner)] * runtime.learner.workers
    if run.preferences is not None and run.preferences.reader == "ray":
        found.append(Bundle(role=DATA, needs={"CPU": 1.0}))  # without it, Ray Data waits for ever
    found += _encoders(run.policy, runtime)
    return found + _producers(runtime, run.rewards_for("evaluate"), runtime.reward.spares)


def sample_bundles(sample: Sample) -> list[Bundle]:
    """Every worker of a sampling."""
    producers = _producers(sample.runtime, sample.rewards_for("evaluate"), spares=0)
    return _encoders(sample.model.recipe, sample.runtime) + producers


def _encoders(recipe: Any, runtime: RuntimeSettings) -> list[Bundle]:
    """The one that encodes prompts, where the policy asks for it."""
    return [bundle_of(ENCODER, runtime.encoder)] if recipe.encodes_in_actor else []


def rollout_bundles(runtime: RuntimeSettings) -> list[Bundle]:
    """One for each process of each rollout worker."""
    return [bundle_of(ROLLOUT, runtime.rollout)] * (runtime.rollout.workers * runtime.rollout.shard)


def _producers(runtime: RuntimeSettings, rewards: tuple[Reward, ...], spares: int) -> list[Bundle]:
    """Rollouts, and the workers of each reward."""
    found = rollout_bundles(runtime)
    for reward in rewards:
        one = bundle_of(reward_role(reward.title), runtime.reward)
        found += [one] * (runtime.reward.workers + spares)
    return found
