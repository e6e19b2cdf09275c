"""Reads what Label Studio exports of its Pairwise tag: JSON, one task per pair, with annotations.

Of a task that is ``data`` with the caption and two pictures under names that the labelling
configuration chose, and ``annotations``, each with ``result``: an entry of type ``pairwise`` with
``{"selected": "left"}`` or ``"right"``, or, for ties, one of type ``choices`` beside it.

Source: https://labelstud.io/guide/task_format.html and https://labelstud.io/tags/pairwise.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlalign.ballots.records import Outcome
from rlalign.core.files import UnreadableText, parse_strict_json, read_text
from rlalign.core.registry import UserError, nearest, read_reason

TIE_WORDS = frozenset({"both", "equal", "neither", "same", "tie"})
"""Choices, in lower case, that mean a tie."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What the caption and the two pictures are called in a task's ``data``."""

    caption: str = "prompt"
    left: str = "image1"
    right: str = "image2"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One person's choice between two pictures, which are named and not read."""

    task: str
    annotator: str
    caption: str
    left: str
    right: str
    outcome: Outcome
    at: float
    """Seconds since 1970; 0 where the export does not say."""
    decide_ms: float


def read_judgements(path: Path, fields: Fields | None = None) -> Iterator[Judgement]:
    """Every annotation of an export, in its order; cancelled ones and those without a choice are
    left out. Raises UserError where the file is none, or a task lacks one of ``fields``."""
    fields = fields or Fields()
    for number, task in enumerate(_tasks(path)):
        place = f"{path}: task {number}"
        if not isinstance(task, Mapping) or not isinstance(task.get("data"), Mapping):
            raise UserError(f"{place} must have data, as an export of Label Studio has")
        words = [_text(task["data"], name, place) for name in _names(fields)]
        annotations = task.get("annotations") or []
        if not isinstance(annotations, list):
            raise UserError(f"{place} must have a list of annotations")
        for annotation in annotations:
            outcome = _outcome(annotation)
            if outcome is not None:
                yield Judgement(
                    task=str(task.get("id", number)),
                    annotator=_person(annotation.get("completed_by")),
                    caption=words[0],
                    left=words[1],
                    right=words[2],
                    outcome=outcome,
                    at=_seconds(annotation.get("created_at")),
                    decide_ms=1000.0 * _number(annotation.get("lead_time")),
                )


def _names(fields: Fields) -> tuple[str, str, str]:
    return fields.caption, fields.left, fields.right


def _tasks(path: Path) -> Sequence[Any]:
    try:
        tasks = parse_strict_json(read_text(path))
    except (OSError, UnreadableText, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} must be an export of Label Studio as JSON ({read_reason(error)})"
        ) from error
    if not isinstance(tasks, list):
        raise UserError(f"{path} must hold a list of tasks: export it as JSON, not as JSON-MIN")
    return tasks


def _text(data: Mapping[str, Any], name: str, place: str) -> str:
    found = data.get(name)
    if not isinstance(found, str) or not found.strip():
        raise UserError(
            f"{place} must have text under {name!r} in its data; {nearest(name, sorted(data))}"
        )
    return found


def _outcome(annotation: Any) -> Outcome | None:
    """What was chosen; None where nothing was, or where the annotation was cancelled."""
    if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
        return None
    results = annotation.get("result")
    for one in results if isinstance(results, list) else []:
        value = one.get("value") if isinstance(one, Mapping) else None
        if not isinstance(value, Mapping):
            continue
        selected = value.get("selected")
        if one.get("type") == "pairwise" and selected in ("left", "right"):
            return selected
        choices = value.get("choices")
        if one.get("type") == "choices" and isinstance(choices, list):
            said = {str(choice).strip().lower() for choice in choices}
            if said & TIE_WORDS:
                return "tie"
    return None


def _person(value: Any) -> str:
    """``completed_by`` is a number, or a record with one and an address, which is left out."""
    if isinstance(value, Mapping):
        value = value.get("id")
    return "" if value is None else str(value)


def _seconds(value: Any) -> float:
    if not isinstance(value, str):
        return 0.0
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else 0.0
