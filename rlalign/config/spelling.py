"""The runtime's settings as they were spelt until 0.1: flat keys such as ``rollout_workers`` in
place of ``rollout: {workers: 2}``. They are read for one more release, with a note."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from rlalign.core.registry import UserError

_OF_EVERY_ROLE = ("workers", "cpus", "gpus", "resources", "labels")
NESTED = {
    f"{role}_{name}": (role, name)
    for role in ("rollout", "reward", "learner")
    for name in _OF_EVERY_ROLE
} | {
    "max_rollout_workers": ("rollout", "max_workers"),
    "rollout_threads": ("rollout", "threads"),
    "learner_threads": ("learner", "threads"),
    "reward_spares": ("reward", "spares"),
}
"""Flat key of ``runtime`` -> role and key."""


def nest_path(path: str) -> str:
    """A dotted path as it is spelt today: ``runtime.rollout_labels.zone`` is
    ``runtime.rollout.labels.zone``."""
    first, _, rest = path.partition(".")
    key, dot, inside = rest.partition(".")
    if first != "runtime" or key not in NESTED:
        return path
    return ".".join(["runtime", *NESTED[key]]) + dot + inside


def nest_runtime(settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Settings in which the flat keys of ``runtime`` stand where they belong. Notes it on stderr
    where ``place`` names a file.

    Raises UserError where a setting is given in both spellings.
    """
    runtime = settings.get("runtime")
    if not isinstance(runtime, Mapping):
        return dict(settings)
    flat = [key for key in runtime if key in NESTED]
    if not flat:
        return dict(settings)
    nested = {key: value for key, value in runtime.items() if key not in NESTED}
    for key in flat:
        role, name = NESTED[key]
        group = nested.get(role, {})
        if not isinstance(group, Mapping):
            continue  # refused as what it is, where settings are parsed
        if name in group:
            raise UserError(
                f"runtime.{key} is runtime.{role}.{name} now, and both are given; keep the second"
            )
        nested[role] = {**group, name: runtime[key]}
    if place:
        note_spelling(place, tuple(f"runtime.{key}" for key in flat))
    return {**settings, "runtime": nested}


@functools.cache
def note_spelling(place: str, paths: tuple[str, ...]) -> None:
    """Says on stderr, once for a place, how old keys are spelt now."""
    keys = ", ".join(f"{path} is {nest_path(path)}" for path in paths)
    print(
        f"note: {place}: {keys} now; the old spelling is read for one more release", file=sys.stderr
    )
