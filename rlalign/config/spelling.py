"""Settings as they were spelt before: the runtime's flat keys such as ``rollout_workers`` in place
of ``rollout: {workers: 2}``, a guard's limits and an optimiser's settings as keys of their group,
and what is decided without a setting now. They are read for one more release, with a note."""

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

OPTIMIZER = {
    "learner.optimizer": "learner.optimizer.name",
    **{f"learner.{key}": f"learner.optimizer.{key}" for key in ("betas", "eps", "weight_decay")},
}
"""Path of what ``learner`` said of its optimiser -> its path today. (``learner.optimizer`` was a
name alone.)"""
_MOMENTS = {"betas": [0.9, 0.999], "eps": 1e-8}
"""AdamW's own -> what they were where nothing was said: config.yaml has them of Adafactor too."""
_WITHOUT_MOMENTS = "adafactor"

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
    if first == "learner" and f"learner.{key}" in OPTIMIZER and key != "optimizer":
        return OPTIMIZER[f"learner.{key}"] + dot + inside
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
    for read in (_nest_runtime, _join_waits, _nest_optimizer, _list_limits, _leave_out):
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


def _nest_optimizer(settings: dict[str, Any]) -> Iterator[str]:
    """Makes a plug-in of an optimiser's name and of its settings among the learner's; one without
    a name is AdamW."""
    learner = settings.get("learner")
    if not isinstance(learner, Mapping):
        return
    given = learner.get("optimizer", {})
    keys = [key for key in ("betas", "eps", "weight_decay") if key in learner]
    if not isinstance(given, str | Mapping) or not (keys or "optimizer" in learner):
        return  # nothing is said, or it is refused as what it is, where settings are parsed
    nested = {"name": given} if isinstance(given, str) else {"name": "adamw", **given}
    for key in keys:
        if key in nested:
            raise UserError(
                f"learner.{key} is learner.optimizer.{key} now, and both are given; keep the second"
            )
        nested[key] = learner[key]
    others = {key: value for key, value in learner.items() if key not in keys}
    settings["learner"] = {**others, "optimizer": _free_of_moments(nested) if keys else nested}
    if isinstance(given, str):
        yield "learner.optimizer"
    yield from (f"learner.{key}" for key in keys)


def _free_of_moments(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser without what says nothing of it: AdamW's own of another, where they are as they
    were by themselves."""
    if optimizer["name"] != _WITHOUT_MOMENTS:
        return optimizer
    return {
        key: value
        for key, value in optimizer.items()
        if key not in _MOMENTS or _plain(value) != _MOMENTS[key]
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def name_optimizer(path: str, value: Any, optimizer: Any) -> Any:
    """What an override gives: of a name in place of an optimiser, the name and what is said of the
    one that is there."""
    if path != "learner.optimizer" or not isinstance(value, str):
        return value
    note_spelling("the command line", (path,))
    said = optimizer if isinstance(optimizer, Mapping) else {}
    return _free_of_moments({**said, "name": value})


def optimizer_as_keys(learner: Mapping[str, Any]) -> dict[str, Any]:
    """A learner as it was spelt before; an optimiser that had no such keys stays a plug-in."""
    own = dict(learner["optimizer"])
    name = own.pop("name")
    if name not in ("adamw", "adafactor", "adamw_8bit"):
        return dict(learner)
    # there was no setting for AdamW before there was another
    others = {key: value for key, value in learner.items() if key != "optimizer"}
    return {**others, **_MOMENTS, **own, **({} if name == "adamw" else {"optimizer": name})}


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
    return GONE.get(path) or OPTIMIZER.get(path) or nest_path(path)
