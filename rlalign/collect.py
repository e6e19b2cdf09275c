"""Turning units of work into scored samples: what the loop asks for, and how one process does it.

``rlalign.runtime`` has the same over a cluster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from rlalign.config import Run
from rlalign.devices import usable
from rlalign.diffusion.rollout import rollout
from rlalign.policies.base import Policy
from rlalign.records import Scored, Unit, Weights
from rlalign.rewards.base import Scorer, score, total


class Collect(Protocol):
    """Turns units of work into scored samples, wherever that happens."""

    def order(self, units: Sequence[Unit], weights: Weights) -> int:
        """Starts the units under these weights and returns a ticket."""
        ...

    def gather(self, ticket: int) -> list[Scored]:
        """Waits for a ticket's samples, in unit order."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Counters for the metrics line: restarts, driver bytes per sample."""
        ...


class LocalCollect:
    """Units on threads of this process, each with a replica of the policy and ``rollout_threads`` inside an operation."""

    def __init__(self, run: Run) -> None:
        """Raises UserError where this machine does not have the run's device."""
        self._rewards = {stream: run.rewards_for(stream) for stream in ("train", "evaluate")}
        device, reward_device = usable(run.runtime.device, "runtime.device"), run.runtime.reward_device
        self._scorers: dict[str, Scorer] = {r.title: r.load(reward_device) for r in self._rewards["evaluate"]}
        lanes = run.runtime.rollout_workers if device == "cpu" else 1
        first = run.policy.load(device)
        self._idle: deque[Policy] = deque([first, *(first.replica() for _ in range(lanes - 1))])
        self._first, self._tag = first, ("", -1)
        self._pool = ThreadPoolExecutor(
            lanes, "rollout", initializer=torch.set_num_threads, initargs=(run.runtime.rollout_threads,)
        )
        self._tickets: dict[int, list[Future[Scored]]] = {}

    def order(self, units: Sequence[Unit], weights: Weights) -> int:
        if self._tag != weights.tag:
            for future in (f for futures in self._tickets.values() for f in futures):
                future.exception()  # units in flight finish under the weights they were ordered with
            self._first.set_weights(dict(weights.tensors))
            self._tag = weights.tag
        ticket = max(self._tickets, default=0) + 1
        self._tickets[ticket] = [self._pool.submit(self._produce, unit, weights.version) for unit in units]
        return ticket

    def gather(self, ticket: int) -> list[Scored]:
        return [future.result() for future in self._tickets.pop(ticket)]

    def facts(self) -> Mapping[str, float]:
        return {"restarts/rollout": 0, "restarts/reward": 0, "driver_bytes_per_sample": 0}

    def _produce(self, unit: Unit, version: int) -> Scored:
        policy = self._idle.pop()
        try:
            start = time.monotonic()
            trajectory, media = rollout(policy, unit, version)
            middle = time.monotonic()
        finally:
            self._idle.append(policy)
        rewards = self._rewards[unit.key.stream]
        raw = {r.title: score(r, self._scorers[r.title], media, unit.prompts) for r in rewards}
        return Scored(
            unit=unit,
            policy_version=version,
            raw=raw,
            total_B=total(self._rewards["train"], raw),
            trajectory=trajectory,
            media_BFCHW=media,
            seconds={"rollout": middle - start, "reward": time.monotonic() - middle},
        )
