"""Runs of earlier versions: what their config.yaml means, and which checkpoints are theirs.

A setting that came later is marked with ``Before(value)``: the value that says what runs did when
there was no such setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlalign.config.files import load_mapping, parse_run, resolved
from rlalign.config.settings import Run
from rlalign.config.spelling import limits_as_keys, optimizer_as_keys
from rlalign.core.registry import Before
from rlalign.learning import checkpoint


def load_begun(path: Path | str, overrides: list[str] | None = None) -> Run:
    """The Run of a run folder's config.yaml with overrides applied. Settings that it does not know
    are as they were before."""
    data = load_mapping(path, overrides or [])
    return fill_earlier(parse_run(data), data)


def identity_of(run: Run) -> str:
    """The digest that ties a checkpoint to its run; settings that came later do not change it while
    they say nothing new."""
    return checkpoint.identity(_as_before(run))


def plain_identity_of(run: Run) -> str:
    """The digest in checkpoints of before some settings might change; see
    ``checkpoint.plain_identity``."""
    return checkpoint.plain_identity(_as_before(run))


def fill_earlier(settings: Any, data: Any) -> Any:
    """Settings of which those that ``data``, a begun run's, leaves out have their value from before
    there was such a setting."""
    if isinstance(settings, tuple | list) and isinstance(data, tuple | list):
        return type(settings)(
            fill_earlier(one, said) for one, said in zip(settings, data, strict=True)
        )
    if not isinstance(settings, BaseModel) or not isinstance(data, Mapping):
        return settings
    changes: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        mark = _mark(settings, name)
        if name in data:
            filled = fill_earlier(value, data[name])
        else:
            filled = value if mark is None else mark.value
        if filled is not value:
            changes[name] = filled
    return settings.model_copy(update=changes) if changes else settings


def _as_before(run: Run) -> dict[str, Any]:
    """A run's settings without those that came later, and in the spelling that identities are taken
    of."""
    said = _known_before(run, resolved(run))
    for group in (said, said.get("refit")):
        if group and group.get("preferences"):
            group["preferences"] = {**group["preferences"], "workers": 0}
    learner = optimizer_as_keys(said["learner"])
    return said | {"guard": limits_as_keys(said["guard"]), "learner": learner}


def _known_before(settings: Any, said: Any) -> Any:
    """What was ``said`` of settings, without those that came later and are as they were before."""
    if isinstance(settings, tuple | list):
        return [_known_before(one, part) for one, part in zip(settings, said, strict=True)]
    if not isinstance(settings, BaseModel):
        return said
    kept = {}
    for name, value in said.items():
        mark = _mark(settings, name)
        if mark is None or getattr(settings, name) != mark.value:
            kept[name] = _known_before(getattr(settings, name), value)
    return kept


def _mark(settings: BaseModel, name: str) -> Before | None:
    metadata = type(settings).model_fields[name].metadata
    return next((one for one in metadata if isinstance(one, Before)), None)
