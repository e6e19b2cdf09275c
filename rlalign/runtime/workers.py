"""The actors that do the work. They hold a policy or a scorer and nothing of the run's state: any of them may die."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from rlalign.config import Run
from rlalign.devices import usable
from rlalign.records import Trajectory, Unit
from rlalign.rewards.base import Reward
from rlalign.runtime.began import BEGAN
from rlalign.runtime.gauges import shown


class Worker:
    """What the pool's manager asks of an actor. ``apply`` never ends the process on an application's error."""

    label = "worker"
    ready_at = 0.0
    """When the constructor was done, seconds since the epoch."""

    def ping(self) -> str:
        """Alive."""
        return "pong"

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function on the worker."""
        return function(self, *args, **kwargs)

    def process_id(self) -> int:
        """The operating system's process."""
        return os.getpid()

    def node_id(self) -> str:
        """Ray's id of the node."""
        return ray.get_runtime_context().get_node_id()

    def loading_seconds(self) -> float:
        """From when the process was told what it is until it could work: imports and weights."""
        return self.ready_at - BEGAN

    def __repr__(self) -> str:
        return self.label


class RolloutWorker(Worker):
    """Holds a policy; denoises one unit a call under the weights that come with it."""

    def __init__(self, run: Run, label: str) -> None:
        import torch

        torch.set_num_threads(run.runtime.rollout_threads)
        self.label = label
        self._policy = run.policy.load(usable(run.runtime.device, "runtime.device"))
        self._tag: tuple[str, int] = ("", -1)
        self.ready_at = time.time()

    @ray.method(num_returns=3)
    def produce(
        self, work: tuple[Unit, tuple[str, int]], tensors: Mapping[str, np.ndarray] | None = None
    ) -> tuple[Trajectory | None, np.ndarray | None, dict[str, Any]]:
        """(trajectory, media uint8 BFCHW, facts): three objects, so that each goes only where it is needed.

        ``work`` is a unit and the tag of its weights. Without ``tensors`` the weights that the worker holds are meant; no
        facts say that it holds others.
        """
        import torch

        from rlalign.diffusion.rollout import rollout

        start = time.monotonic()
        unit, tag = work
        if tag != self._tag and tensors is None:
            return None, None, {}
        with shown(f"{unit.key} under {tag[0]} v{tag[1]}"):
            if tensors is not None and tag != self._tag:
                self._policy.set_weights({n: torch.from_numpy(np.array(a)) for n, a in tensors.items()})
                self._tag = tag
            trajectory, media = rollout(self._policy, unit, tag[1])
        return trajectory, media, {"seconds": time.monotonic() - start, "process": os.getpid()}


class RewardWorker(Worker):
    """Holds one reward's scorer; scores one unit's media a call."""

    def __init__(self, reward: Reward, device: str, threads: int, label: str) -> None:
        import torch

        torch.set_num_threads(threads)
        self.label = label
        self._reward, self._scorer = reward, reward.load(usable(device, "runtime.device"))
        self.ready_at = time.time()

    def score(self, media_BFCHW: np.ndarray, prompts: Sequence[str], what: str = "") -> tuple[np.ndarray, float]:
        """(raw scores (B,) float32 under the reward's own error policy, seconds). ``what`` names the media."""
        from rlalign.rewards.base import score

        start = time.monotonic()
        with shown(f"{self._reward.title} of {what or 'media'}"):
            return score(self._reward, self._scorer, media_BFCHW, prompts), time.monotonic() - start
