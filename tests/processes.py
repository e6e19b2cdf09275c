"""Processes of a running Ray, as its own table has them: an actor that is busy, or that waits for
the test, need not be asked."""

from __future__ import annotations

import os
import signal

import ray
from ray._private import state


def process_of(actor: str) -> int:
    """The process of the living actor of this name."""
    return next(
        one["Pid"]
        for one in state.actors(actor_state_name="ALIVE").values()
        if one["Name"] == actor
    )


def first_of(role: str) -> str:
    """The name of the first living actor of a role ("rollout", "reward", "coordinator")."""
    return min(
        one["Name"]
        for one in state.actors(actor_state_name="ALIVE").values()
        if f"/{role}" in one["Name"]
    )


def kill_first(role: str) -> None:
    """SIGKILL for the process of the first living actor of a role."""
    assert ray.is_initialized()
    os.kill(process_of(first_of(role)), signal.SIGKILL)
