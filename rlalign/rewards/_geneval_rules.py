"""GenEval's rules: what a list of detections says about a prompt's record. Pure functions; no
network.

Source: Ghosh 2023, arXiv:2310.11513, sections 3.1 and 3.2, with the thresholds of the authors'
``evaluate_images.py``; the graded score: Liu 2025, arXiv:2505.05470 (Flow-GRPO), as its reward
server computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rlalign.core.registry import UserError, explain

Colour = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
]
COLOURS: tuple[str, ...] = get_args(Colour)
"""The answers that a colour may have, in the order that breaks a tie."""
Relation = Literal["left of", "right of", "above", "below"]
_NO_OFFSET = 1e-3
"""Pixels; two centres that are nearer on both axes stand in no relation."""
_DIRECTION = 0.5
"""The share of the distance between two centres that an axis needs: 60 degrees around it."""


class Detection(NamedTuple):
    """One object that a detector found."""

    score: float
    """The detector's confidence, 0 to 1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels of the picture."""
    mask_HW: np.ndarray | None = None
    """Which pixels are its own (bool); None where the detector gives boxes alone."""


Found = Mapping[str, Sequence[Detection]]
"""Class name -> its detections, the surest first."""
ReadColours = Callable[[str, Sequence[Detection]], Sequence[str]]
"""(class name, detections) -> the colour of each."""


class Limits(NamedTuple):
    """Which detections count. The defaults are the published ones."""

    threshold: float = 0.3
    """Confidence that a detection must exceed."""
    counting_threshold: float = 0.9
    """The same in the task "counting"."""
    max_objects: int = 16
    """Detections of a class, at most."""
    max_overlap: float = 1.0
    """Intersection over union from which the less sure of two is dropped; 1 keeps all."""
    position_threshold: float = 0.1
    """Share of both objects' sizes by which centres must differ before it says anything."""


# --- a record ------------------------------------------------------------------------------------


class _Clause(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    class_name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1)


def _as_pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    # a column of a table has null where a line of JSON has nothing
    return [] if value is None else value


class Wanted(_Clause):
    """Objects that the picture must show."""

    color: Colour | None = None
    position: Annotated[tuple[Relation, int] | None, BeforeValidator(_as_pair)] = None
    """The relation, and the place in ``include`` of the objects that it is to."""


class Record(BaseModel):
    """What a GenEval prompt asks for: a line of the published ``evaluation_metadata.jsonl``."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    tag: str = Field(min_length=1)
    include: list[Wanted] = Field(min_length=1)
    exclude: Annotated[list[_Clause], BeforeValidator(_as_list)] = []

    @model_validator(mode="after")
    def _refers_to_what_comes_before(self) -> Record:
        for place, wanted in enumerate(self.include):
            if wanted.position is not None and not 0 <= wanted.position[1] < place:
                raise ValueError(
                    f"include.{place}.position must refer to an object that comes before it in"
                    f" include, got {wanted.position[1]}"
                )
        return self


def read_record(record: Mapping[str, Any], place: str, prompt: str) -> Record:
    """A prompt's record, checked. Raises UserError naming the prompt and the part that is wrong."""
    if not record:
        raise UserError(
            f"{place}: the prompt {str(prompt)!r} has no record; GenEval needs tag and include with"
            " every prompt, as its evaluation_metadata.jsonl has them"
        )
    try:
        return Record.model_validate(dict(record))
    except ValidationError as error:
        said = explain(error, Record, "record")
        raise UserError(f"{place}: the prompt {str(prompt)!r}: {said}") from error


# --- what is detected ----------------------------------------------------------------------------


def keep(detections: Sequence[Detection], threshold: float, limits: Limits) -> list[Detection]:
    """The detections of one class that count, the surest first.

    Those above ``threshold``, at most ``max_objects`` of them, without those that overlap a surer
    one. Of two with the same confidence the later one comes first, as in the authors' reversed
    sort.
    """
    score_N = np.array([one.score for one in detections])
    order = np.argsort(score_N, kind="stable")[::-1]
    sure = [detections[i] for i in order if score_N[i] > threshold][: limits.max_objects]
    if limits.max_overlap == 1.0:
        return sure
    kept = list[Detection]()
    for one in sure:
        if all(overlap(other.box, one.box) < limits.max_overlap for other in kept):
            kept.append(one)
    return kept


def keep_all(found: Found, tag: str, limits: Limits) -> dict[str, list[Detection]]:
    """The same for every class, under the threshold of the task."""
    threshold = limits.counting_threshold if tag == "counting" else limits.threshold
    kept = {name: keep(some, threshold, limits) for name, some in found.items()}
    return {name: some for name, some in kept.items() if some}


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes whose right and bottom pixels belong to them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - common
    return common / union if union else 0.0


def relations(a: Detection, b: Detection, threshold: float) -> set[str]:
    """Where ``a`` is to ``b``: of left of, right of, above and below none, one or two.

    The offset of the centres is shortened on each axis by ``threshold`` times both sizes. An axis
    says something where what is left exceeds half the distance between the centres.
    """
    corners_22 = [np.array(one.box, dtype=np.float64).reshape(2, 2) for one in (a, b)]
    centre_a, centre_b = (c.mean(0) for c in corners_22)
    sizes_2 = sum(np.abs(c[1] - c[0]) for c in corners_22)
    offset_2 = centre_a - centre_b
    left_2 = np.sign(offset_2) * np.maximum(np.abs(offset_2) - threshold * sizes_2, 0.0)
    if (np.abs(left_2) < _NO_OFFSET).all():
        return set()
    x, y = left_2 / np.linalg.norm(offset_2)
    named = {
        "left of": x < -_DIRECTION,
        "right of": x > _DIRECTION,
        "above": y < -_DIRECTION,
        "below": y > _DIRECTION,
    }
    return {name for name, holds in named.items() if holds}


# --- verdicts ------------------------------------------------------------------------------------


def is_correct(record: Record, found: Found, colours: ReadColours, threshold: float) -> bool:
    """GenEval's own verdict: each object at least as often as asked for, and nothing excluded.

    Colour and position are those of the surest ones, as many as are asked for. ``threshold`` is
    ``Limits.position_threshold``.
    """
    groups = list[Sequence[Detection] | None]()
    for wanted in record.include:
        some = found.get(wanted.class_name, ())[: wanted.count]
        holds = len(some) == wanted.count
        if holds and wanted.color is not None:
            holds = list(colours(wanted.class_name, some)).count(wanted.color) == wanted.count
        if holds and wanted.position is not None:
            holds = _stands(some, groups, wanted.position, threshold)
        groups.append(some if holds else None)
    excluded = any(len(found.get(e.class_name, ())) >= e.count for e in record.exclude)
    return not excluded and all(group is not None for group in groups)


def grade(
    record: Record, found: Found, colours: ReadColours, threshold: float
) -> tuple[bool, float]:
    """Flow-GRPO's (strict verdict, graded score).

    Strict: each object exactly as often as asked for, all of that colour and in that position;
    ``exclude`` is not looked at. Graded: the mean over parts. A count gives 1 - |asked - found| /
    asked, below 0 for more than twice as many. A colour gives the same of the objects that have it.
    A position gives 1, a wrong one 0 and 1, one to an object that failed 0. Where the count is
    wrong, colour or position give one 0.
    """
    groups = list[Sequence[Detection] | None]()
    parts = list[float]()
    for wanted in record.include:
        some = found.get(wanted.class_name, ())
        parts.append(_closeness(wanted.count, len(some)))
        holds = len(some) == wanted.count
        if not holds and (wanted.color is not None or wanted.position is not None):
            parts.append(0.0)
        if holds and wanted.color is not None:
            same = list(colours(wanted.class_name, some)).count(wanted.color)
            parts.append(_closeness(wanted.count, same))
            holds = same == wanted.count
        if holds and wanted.position is not None:
            holds = _stands(some, groups, wanted.position, threshold)
            parts += [] if holds else [0.0]
            parts += [] if groups[wanted.position[1]] is None else [1.0]
        groups.append(some if holds else None)
    return all(group is not None for group in groups), sum(parts) / len(parts)


def _stands(
    some: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    position: tuple[str, int],
    threshold: float,
) -> bool:
    """Whether each of ``some`` is so to each of the group that the position refers to; false where
    that group failed."""
    relation, place = position
    group = groups[place]
    if group is None:
        return False
    return all(relation in relations(a, b, threshold) for a in some for b in group)


def _closeness(asked: int, found: int) -> float:
    return 1.0 - abs(asked - found) / asked
