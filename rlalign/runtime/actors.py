"""How the actors that work are made: their names, what they reserve, and that Ray restarts them."""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.rewards.base import Reward
from rlalign.runtime.placement import Bundle
from rlalign.runtime.reservation import bundle_of
from rlalign.runtime.roles import Role, reward_role
from rlalign.runtime.workers import RewardWorker

RESTART: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0}


def name_owner(name: str) -> str:
    """Whose actors they are: a run's or a sampling's name, with a mark that tells two of one name
    apart."""
    return f"{name}-{uuid.uuid4().hex[:6]}"


def actor_name(owner: str, role: Role, number: int) -> str:
    """An actor's name on the dashboard: whose it is, what it does, its number."""
    return f"{owner}/{role.actor}-{number}"


def create_reward_worker(
    owner: str, number: int, reward: Reward, runtime: RuntimeSettings, *, counts: bool = True
) -> ActorHandle:
    """A worker of one reward. Without ``counts`` it reserves its GPU's share alone."""
    role = reward_role(reward.title)
    kind = actor_class(RewardWorker, bundle_of(role, runtime.reward), counts=counts)
    return kind.options(name=actor_name(owner, role, number)).remote(
        reward, runtime.reward_device, runtime.rollout.threads, f"{role} {number}"
    )


def actor_class(cls: type, bundle: Bundle, *, counts: bool = True) -> Any:
    """A class of workers that Ray restarts, each on what the bundle reserves. Without ``counts``
    one reserves its GPU's share alone, where its labels are."""
    found = reserved(bundle, counts=counts)
    if bundle.labels:
        found["label_selector"] = dict(bundle.labels)
    return ray.remote(**found, **RESTART)(cls)


def reserved(bundle: Bundle, *, counts: bool) -> dict[str, Any]:
    """What an actor on a bundle reserves, as Ray's options."""
    needs = dict(bundle.needs)
    found: dict[str, Any] = {
        "num_cpus": needs.pop("CPU", 0.0) if counts else 0.0,
        "num_gpus": needs.pop("GPU", 0.0),
    }
    if needs and counts:
        found["resources"] = needs
    return found
