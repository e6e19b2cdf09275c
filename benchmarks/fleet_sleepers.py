"""Workers that sleep for as long as their prompts say: ``"1.25 0.01"`` is a rollout of 1.25 s and a
score of 0.01 s. Little is imported here, as each of them is a process."""

from __future__ import annotations

import os
import sys
import time
import types
from typing import Any

import numpy as np
import ray

ROWS = 4
"""Samples of a unit."""


def prompts_of(rollout: float, reward: float) -> tuple[str, ...]:
    """A unit's prompts."""
    return (f"{rollout!r} {reward!r}",) * ROWS


PLAIN = {
    "rlalign.engine": (),
    "rlalign.engine.pieces": ("Rollout",),
    "rlalign.runtime.weights": ("WeightsRef", "Manifest"),
}
"""Module -> its classes that a worker is handed, and whose modules need torch."""


def _leave_torch_out() -> None:
    """Has this process read what it is handed as plain records. The classes that could do it need
    torch, which is 300 MB and seconds of CPU for each of 64 processes."""
    for name, classes in PLAIN.items():
        module: Any = sys.modules.setdefault(name, types.ModuleType(name))
        for one in classes:
            setattr(module, one, type(one, (), {}))


def _check_torch_is_out() -> None:
    """Raises where this process has loaded torch after all: times would be those of imports."""
    if "torch" in sys.modules:
        raise RuntimeError("a worker that sleeps was handed a record whose module needs torch")


class Sleeper:
    """What a pool asks of an actor, and the benchmark."""

    def ping(self) -> str:
        return "pong"

    def process_id(self) -> int:
        return os.getpid()


class SleepingRollout(Sleeper):
    """Hands over a few bytes of latents and of media."""

    def __init__(self) -> None:
        _leave_torch_out()

    @ray.method(num_returns=3)
    def do(self, work: Any, tag: Any, tensors: Any = None) -> tuple[Any, Any, Any]:
        from rlalign.runtime.gauges import shown

        _check_torch_is_out()
        prompts = work.unit.prompts
        seconds = float(prompts[0].split()[0])
        with shown(f"{work.unit.key} under v{tag[1]}"):
            time.sleep(seconds)
        media = np.zeros((len(prompts), 1, 3, 8, 8), np.uint8)
        return np.ones(1000, np.float16), {"media": media}, ({"seconds": seconds}, "")


class SleepingReward(Sleeper):
    """Scores everything 0."""

    def score(
        self, media: Any, prompts: Any, unit: str = "", drop: bool = False
    ) -> tuple[Any, float]:
        from rlalign.runtime.gauges import shown

        _check_torch_is_out()
        seconds = float(prompts[0].split()[1])
        with shown(f"nothing of {unit}"):
            time.sleep(seconds)
        return np.zeros(len(prompts), np.float32), seconds
