"""Settings as they were spelt before: the runtime's flat keys such as ``rollout_workers`` in place
of ``rollout: {workers: 2}``, a guard's limits as keys of its own, and what is decided without a
setting now. They are read for one more release, with a note."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
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

LIMITS = {
    "held_out": ("held_out", "reward"),
    "drop": ("held_out", "drop"),
    "kl_most": ("kl", "most"),
    "diversity_least": ("diversity", "least"),
}
"""Key of ``guard`` -> the limit that it belongs to, and its setting there."""
_FIRST = {"held_out": "reward", "kl": "most", "diversity": "least"}
"""Limit -> the setting without which there is none."""

GONE = {
    "preferences.workers": "the number of cores",
    "refit.preferences.workers": "the number of cores",
}
"""Dotted path -> what decides it now. No number depends on one of them."""


def nest_path(path: str) -> str:
    """A dotted path as it is spelt today: ``runtime.rollout_labels.zone`` is
    ``runtime.rollout.labels.zone``."""
    first, _, rest = path.partition(".")
    key, dot, inside = rest.partition(".")
    if path == "runtime.recovery_seconds":
        return "runtime.start_seconds"
    if first != "runtime" or key not in NESTED:
        return path
    return ".".join(["runtime", *NESTED[key]]) + dot + inside


def respell(settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Settings as they are spelt today. Notes on stderr what was otherwise, where ``place`` names a
    file.

    Raises UserError where a setting is given in both spellings.
    """
    found = dict(settings)
    old: list[str] = []
    for read in (_nest_runtime, _join_waits, _list_limits, _leave_out):
        old += read(found)
    if place and old:
        note_spelling(place, tuple(old))
    return found


def _nest_runtime(settings: dict[str, Any]) -> Iterator[str]:
    """Puts the flat keys of ``runtime`` where they belong, and gives their paths."""
    runtime = settings.get("runtime")
    if not isinstance(runtime, Mapping):
        return
    nested = {key: value for key, value in runtime.items() if key not in NESTED}
    for key in (key for key in runtime if key in NESTED):
        role, name = NESTED[key]
        group = nested.get(role, {})
        if not isinstance(group, Mapping):
            continue  # refused as what it is, where settings are parsed
        if name in group:
            raise UserError(
                f"runtime.{key} is runtime.{role}.{name} now, and both are given; keep the second"
            )
        nested[role] = {**group, name: runtime[key]}
        yield f"runtime.{key}"
    settings["runtime"] = nested


def _join_waits(settings: dict[str, Any]) -> Iterator[str]:
    """``recovery_seconds`` was how long a dead worker might take to start again: of both, the
    longer holds."""
    runtime = settings.get("runtime")
    if not isinstance(runtime, Mapping) or "recovery_seconds" not in runtime:
        return
    waits = [runtime[key] for key in ("recovery_seconds", "start_seconds") if key in runtime]
    joined = {key: value for key, value in runtime.items() if key != "recovery_seconds"}
    # what is no number is refused as such, where settings are parsed
    wrong = [wait for wait in waits if not isinstance(wait, int | float)]
    joined["start_seconds"] = wrong[0] if wrong else max(waits)
    settings["runtime"] = joined
    yield "runtime.recovery_seconds"


def _list_limits(settings: dict[str, Any]) -> Iterator[str]:
    """Makes limits of the keys that a guard had for each; 0 and an empty title are none."""
    guard = settings.get("guard")
    if not isinstance(guard, Mapping) or not any(key in guard for key in LIMITS):
        return
    given = guard.get("limits", [])
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        return  # refused as what it is, where settings are parsed
    limits = [dict(one) for one in given]
    for key in (key for key in LIMITS if key in guard):
        name, setting = LIMITS[key]
        limit = next((one for one in limits if one.get("name") == name), None)
        if limit is None:
            limit = {"name": name}
            limits.append(limit)
        limit[setting] = guard[key]
        yield f"guard.{key}"
    watched = [one for one in limits if one.get(_FIRST.get(one.get("name", ""), "name"))]
    rest = {key: value for key, value in guard.items() if key not in LIMITS}
    settings["guard"] = {**rest, "limits": watched}


def limits_as_keys(guard: Mapping[str, Any]) -> dict[str, Any]:
    """A guard as it was spelt before; limits that had no keys stay a list."""
    keys: dict[str, Any] = {"held_out": "", "drop": 0.05}
    said = set[str]()
    rest = []
    for limit in guard["limits"]:
        own = {key for key, (name, _) in LIMITS.items() if name == limit["name"]}
        if not own or own & said:
            rest.append(limit)
            continue
        keys |= {key: limit[LIMITS[key][1]] for key in own}
        said |= own
    others = {key: value for key, value in guard.items() if key != "limits"}
    return {**others, **keys, **({"limits": rest} if rest else {})}


def _leave_out(settings: dict[str, Any]) -> Iterator[str]:
    """Drops what there is no setting for any more."""
    for path in GONE:
        *groups, last = path.split(".")
        if _drop(settings, groups, last):
            yield path


def _drop(settings: dict[str, Any], groups: list[str], name: str) -> bool:
    """Whether a setting was there, in groups of groups, of which copies take the place."""
    if not groups:
        return settings.pop(name, _drop) is not _drop
    inside = settings.get(groups[0])
    if not isinstance(inside, Mapping):
        return False
    settings[groups[0]] = copied = dict(inside)
    return _drop(copied, groups[1:], name)


@functools.cache
def note_spelling(place: str, paths: tuple[str, ...]) -> None:
    """Says on stderr, once for a place, how old keys are spelt now."""
    keys = ", ".join(f"{path} is {_now(path)}" for path in paths)
    print(
        f"note: {place}: {keys} now; the old spelling is read for one more release", file=sys.stderr
    )


def _now(path: str) -> str:
    room, _, key = path.partition(".")
    if room == "guard":
        name, setting = LIMITS[key]
        return f"{setting} of {name} in guard.limits"
    return GONE.get(path) or nest_path(path)
