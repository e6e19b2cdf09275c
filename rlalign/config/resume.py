"""Which settings may change where a run goes on: those that no number of its weights, metrics or
evaluations depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from rlalign.config.files import resolved
from rlalign.config.runtime import RuntimeSettings
from rlalign.config.settings import Run
from rlalign.config.spelling import GONE, nest_path
from rlalign.core.registry import UserError

_DEVICE = "another device rounds otherwise"
_THREADS = "another number of threads adds in another order"
_MEASURE = (
    "the evaluations before and after would measure different things (rlalign evaluate measures a"
    " run folder anew)"
)
REASONS = {
    "runtime.device": _DEVICE,
    "runtime.rollout.threads": _THREADS,
    "runtime.learner.threads": _THREADS,
    "runtime.max_staleness": "rounds would be made under weights of another age",
    "evaluate.prompts": _MEASURE,
    "evaluate.rewards": _MEASURE,
    "evaluate.seed": _MEASURE,
}
"""Why a setting has to stay that lies among those that may change."""


def paths_of(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting of a class, of its groups too."""
    for name, setting in cls.model_fields.items():
        if isinstance(setting.default, BaseModel):
            yield from paths_of(type(setting.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


FREE = (
    *(
        "name",
        "rounds",
        "write_pairs",
        "checkpoint.every",
        "checkpoint.keep",
        "evaluate.every",
        "evaluate.grid",
        "log",
    ),
    "preferences.ballots.patience_seconds",
    "refit.preferences.ballots.patience_seconds",
    "policy.embeddings",
    "learner.shard",
    *(path for path in paths_of(RuntimeSettings, "runtime.") if path not in REASONS),
)
"""The settings that may change, by dotted path; ``_reason`` knows when one of them may not."""


def refuse_changes(before: Run, after: Run) -> None:
    """Raises UserError where the run that goes on would give other numbers than the one that was
    begun."""
    mine = _flat(resolved(after))
    its = _flat(resolved(before))
    for path in sorted(mine.keys() | its.keys()):
        reason = _reason(path, before, after)
        if mine.get(path) != its.get(path) and reason:
            old, new = (_show(path, settings) for settings in (its, mine))
            raise UserError(f"--resume: {path} must stay {old}, got {new}: {reason}; {_advice()}")


def refuse_fixed(assignments: Sequence[str]) -> None:
    """The same of ``key=value`` alone, where the run's own settings are elsewhere: refuses what may
    never change."""
    for assignment in assignments:
        path = nest_path(assignment.partition("=")[0].strip())
        if not any(_is_in(path, free) or _is_in(free, path) for free in (*FREE, *GONE)):
            reason = _why(path)
            raise UserError(
                f"--resume: {path} must stay as it is, got {assignment!r}: {reason}; {_advice()}"
            )


def _reason(path: str, before: Run, after: Run) -> str:
    """Why a setting has to stay; "" where it may change."""
    old = before.runtime
    new = after.runtime
    if path == "runtime.device" and _kind(old.device) == _kind(new.device):
        return ""  # another card of the kind
    if path == "runtime.reward.gpus" and _kind(old.reward_device) != _kind(new.reward_device):
        return f"rewards would compute on {new.reward_device}, and {_DEVICE}"
    if path == "runtime.encoder.gpus" and _kind(old.encoder_device) != _kind(new.encoder_device):
        return f"prompts would be encoded on {new.encoder_device}, and {_DEVICE}"
    in_actor = before.policy.encodes_in_actor or after.policy.encodes_in_actor
    if path == "policy.embeddings" and in_actor and _kind(new.encoder_device) != _kind(new.device):
        return f"an actor encodes on {new.encoder_device}, and {_DEVICE}"
    if path == "checkpoint.every" and (old.max_staleness or new.max_staleness):
        return "with runtime.max_staleness no round is ordered ahead across a checkpoint"
    if path == "evaluate.every" and before.guard.limits:
        return "the guard counts evaluations"
    if any(_is_in(path, free) for free in FREE):
        return ""
    return _why(path)


def _why(path: str) -> str:
    return next(
        (why for fixed, why in REASONS.items() if _is_in(path, fixed)),
        "its numbers would be others",
    )


def _show(path: str, settings: Mapping[str, Any]) -> str:
    text = repr(settings[path]) if path in settings else "left out"
    return text if len(text) <= 100 else f"{text[:80]}..."


def _advice() -> str:
    own = [path for path in FREE if not path.startswith("runtime.")]
    runtime = [path.removeprefix("runtime.") for path in FREE if path.startswith("runtime.")]
    return (
        "leave it out, or start anew with --out DIR. "
        f"What may change: {', '.join(own)}, and of runtime {', '.join(runtime)}"
    )


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _is_in(path: str, whole: str) -> bool:
    return path == whole or path.startswith(f"{whole}.")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted path, in which a plug-in of a list is a number."""
    return dict(_leaves(settings, ""))


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        inside = value
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            inside = {str(number): one for number, one in enumerate(value)}
        if isinstance(inside, Mapping) and inside:
            yield from _leaves(inside, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
