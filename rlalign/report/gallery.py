"""The pictures of a report, read back from the sample grids: before and after, and through the
run."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from rlalign.core.media import encode_image, to_image
from rlalign.core.pictures import Cell, read_grid
from rlalign.learning.changes import read_changes
from rlalign.report.files import RunFiles
from rlalign.report.numbers import gap

_STRIP_ROUNDS = 7
_STRIP_PROMPTS = 6
_LOSSLESS = 128
"""Pixels: larger pictures are embedded as JPEG."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt under the first and the last policy, same noise."""

    before: Cell
    after: Cell

    @property
    def gain(self) -> float | None:
        return gap(self.before.score, self.after.score)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures of a run."""

    rounds: list[int]
    """Evaluations on show in the film strip, first and last among them; empty under three."""
    strip: list[list[Cell]]
    """A row per prompt, a column per round."""
    first: int
    last: int
    pairs: list[Pair]
    """First and last evaluation; empty under two."""
    gains: list[Pair]
    """Of all prompts of the last evaluation those that gained most, the largest gain first."""
    losses: list[Pair]
    """Those that lost most, the largest loss first."""


def gallery(run: RunFiles) -> Gallery:
    """From the grids of the evaluations that have one."""
    grids: dict[int, list[Cell]] = {}
    for number in sorted({int(e["round"]) for e in run.evaluations}):
        path = run.folder / "samples" / f"round-{number:05d}.png"
        found = read_grid(path) if path.is_file() else []
        if found:
            grids[number] = found
    known = list(grids)
    if len(known) < 2:
        return Gallery(rounds=[], strip=[], first=0, last=0, pairs=[], gains=[], losses=[])
    first = known[0]
    last = known[-1]
    pairs = [Pair(before=b, after=a) for b, a in zip(grids[first], grids[last], strict=False)]
    # the film strip: so many rounds, evenly spaced, first and last among them
    count = min(len(known), _STRIP_ROUNDS)
    places = [round(i * (len(known) - 1) / (count - 1)) for i in range(count)] if count > 2 else []
    rounds = [known[place] for place in places]
    columns = [grids[r][:_STRIP_PROMPTS] for r in rounds]
    strip = [list(row) for row in zip(*columns, strict=False)]
    changed = [Pair(before=b, after=a) for b, a in read_changes(run.folder, last)]
    return Gallery(
        rounds=rounds,
        strip=strip,
        first=first,
        last=last,
        pairs=pairs,
        gains=[pair for pair in changed if (pair.gain or 0.0) > 0],
        losses=[pair for pair in changed if (pair.gain or 0.0) < 0],
    )


def cells(media_NCHW: np.ndarray, captions: Sequence[str], scores: Iterable[float]) -> list[Cell]:
    """uint8 pictures with their captions and scores; a score that is not finite is missing."""
    return [
        Cell(
            picture=to_image(pixels),
            caption=caption,
            score=float(score) if isfinite(score) else None,
        )
        for pixels, caption, score in zip(media_NCHW, captions, scores, strict=True)
    ]


def picture_uri(cell: Cell) -> str:
    """The picture as a data URI: PNG where it is small, else JPEG."""
    if max(cell.picture.size) <= _LOSSLESS:
        kind, settings = "png", {"optimize": True}
    else:
        kind, settings = "jpeg", {"quality": 88}
    blob = encode_image(cell.picture, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(blob).decode()}"
