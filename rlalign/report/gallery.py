"""The pictures and clips of a report, read back from the sample grids: before and after, and
through the run.

A clip is one picture of all its frames in a row, of which a page shows one after another; all clips
of a page run on one clock. Paper shows a few of its frames.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from rlalign.core.clips import Clip
from rlalign.core.media import encode_image, to_image
from rlalign.core.pictures import Cell, read_grid, shrink_clip
from rlalign.learning.changes import read_changes
from rlalign.report.files import RunFiles
from rlalign.report.numbers import gap

_STRIP_ROUNDS = 7
_STRIP_PROMPTS = 6
_LOSSLESS = 128
"""Pixels: larger pictures are embedded as JPEG, larger clips as lossy WebP."""
_FILM_SIDE = 160
"""Pixels of a frame of a larger clip."""
_STILL_FRAMES = 4
"""Of a clip on paper."""


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


def cells(media_NFCHW: np.ndarray, captions: Sequence[str], scores: Iterable[float]) -> list[Cell]:
    """uint8 pictures or clips with their captions and scores; a score that is not finite is
    missing."""
    return [
        Cell(
            media_FCHW=media_FCHW,
            caption=caption,
            score=float(score) if isfinite(score) else None,
        )
        for media_FCHW, caption, score in zip(media_NFCHW, captions, scores, strict=True)
    ]


def has_clips(gallery: Gallery) -> bool:
    """Whether a run's pictures are clips, so that its page needs a button that stops them."""
    return any(cell.is_clip for pair in gallery.pairs for cell in (pair.before, pair.after))


def picture_uri(cell: Cell) -> str:
    """The picture, or a clip's first frame, as a data URI: PNG where it is small, else JPEG."""
    if max(cell.picture.size) <= _LOSSLESS:
        kind, settings = "png", {"optimize": True}
    else:
        kind, settings = "jpeg", {"quality": 88}
    return _data_uri(encode_image(cell.picture, kind, **settings), kind)


def film_uri(cell: Cell) -> str:
    """All frames of a clip from left to right in one picture, as a data URI: PNG where they are
    small, else lossy WebP of shrunk frames."""
    return _row_uri(Clip(media_FCHW=cell.media_FCHW))


def still_uri(cell: Cell) -> str:
    """The same of a few frames, evenly spaced, first and last among them."""
    return _row_uri(shrink_clip(Clip(media_FCHW=cell.media_FCHW), _STILL_FRAMES))


def _row_uri(clip: Clip) -> str:
    small = max(clip.media_FCHW.shape[-2:]) <= _LOSSLESS
    if not small:
        clip = shrink_clip(clip, side=_FILM_SIDE)
    row = to_image(np.concatenate(clip.media_FCHW, axis=2))
    if small:
        return _data_uri(encode_image(row, "png", optimize=True), "png")
    return _data_uri(encode_image(row, "webp", quality=80), "webp")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
