"""The pictures of a report, read back from the sample grids: before and after, and through the run."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from rlalign.pictures import Cell, read_grid
from rlalign.report.files import RunFiles
from rlalign.report.numbers import gap

_STRIP_ROUNDS, _STRIP_PROMPTS = 7, 6
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


def gallery(run: RunFiles) -> Gallery:
    """From the grids of the evaluations that have one."""
    paths = {int(e["round"]): run.folder / "samples" / f"round-{e['round']:05d}.png" for e in run.evaluations}
    grids = {r: cells for r, path in sorted(paths.items()) if path.is_file() and (cells := read_grid(path))}
    known = list(grids)
    if len(known) < 2:
        return Gallery(rounds=[], strip=[], first=0, last=0, pairs=[])
    first, last = known[0], known[-1]
    pairs = [Pair(before=b, after=a) for b, a in zip(grids[first], grids[last], strict=False)]
    count = min(len(known), _STRIP_ROUNDS)
    rounds = [known[round(i * (len(known) - 1) / (count - 1))] for i in range(count)] if count > 2 else []
    rows = min([_STRIP_PROMPTS, *(len(grids[r]) for r in rounds)])
    strip = [[grids[r][i] for r in rounds] for i in range(rows)] if rounds else []
    return Gallery(rounds=rounds, strip=strip, first=first, last=last, pairs=pairs)


def picture_uri(cell: Cell) -> str:
    """The picture as a data URI."""
    small, blob = max(cell.picture.size) <= _LOSSLESS, io.BytesIO()
    if small:
        cell.picture.save(blob, format="PNG", optimize=True)
    else:
        cell.picture.save(blob, format="JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(blob.getvalue()).decode()}"
