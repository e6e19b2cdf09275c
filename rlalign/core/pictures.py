"""Grids of pictures or clips with captions and scores, as PNG. A grid can be read back: what it
shows is also written inside it.

Of a clip a cell shows a strip of up to ``STRIP`` frames, evenly spaced, first and last among them.
The clips themselves lie beside the grid: those of ``round-00010.png`` in ``round-00010/`` as
animated WebP, numbered as the cells are. They have at most ``MOST_FRAMES`` frames, evenly spaced,
and are lossless where no side is above ``LARGE_CELL``; larger ones are shrunk to it and lossy.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.core.clips import RATE, Clip, decode_clip, encode_animation, spread
from rlalign.core.files import replacing
from rlalign.core.media import UnreadablePicture, to_image
from rlalign.core.prompts import Prompt, record_of

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN = 10
CAPTION_LINES = 3
LINE = 15
SMALL_CELL = 160
LARGE_CELL = 256
STRIP = 6
GAP = 4
"""Pixels between two frames of a strip; a frame fits in half the side of a picture's cell."""
MOST_FRAMES = 33
SHEET_SIDE = 128
SHEET_FRAMES = 17
"""Of the clips of one sheet, where they are larger than a small cell."""
PAPER = (250, 250, 248)
INK = (40, 40, 44)
GOOD = (22, 128, 76)
BAD = (190, 60, 50)
_KEY = "rlalign"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture or clip of a grid."""

    media_FCHW: np.ndarray
    """(F, 3, H, W) uint8, as it was given, or shrunk to the cell where it was larger."""
    caption: str
    """With its record, where it has one."""
    score: float | None
    """None where the score was missing."""
    rate: float = RATE
    """Frames a second of a clip."""

    @property
    def picture(self) -> Image:
        """The picture, or a clip's first frame."""
        return to_image(self.media_FCHW[0])

    @property
    def is_clip(self) -> bool:
        """Whether there is something to play."""
        return len(self.media_FCHW) > 1


def write_grid(
    path: Path,
    media_NFCHW: np.ndarray,
    captions: Sequence[str],
    scores: Sequence[float],
    *,
    columns: int = 8,
    title: str = "",
    rate: float = RATE,
) -> None:
    """uint8 pictures or clips with wrapped captions and coloured scores, written whole or not at
    all; of clips so many columns as are as wide, an even number where ``columns`` is even.

    Small pictures are enlarged by a whole factor without smoothing, large ones shrunk. The colour
    runs from red at the lowest to green at the highest score of the grid. Clips of ``rate`` frames
    a second are written beside it.
    """
    from PIL.PngImagePlugin import PngInfo

    # of a clip the frames of its strip, each in a cell of its own
    side = max(media_NFCHW.shape[-2:])
    frames = media_NFCHW.shape[1]
    cell = SMALL_CELL if side <= SMALL_CELL else LARGE_CELL
    own = cell if frames == 1 else cell // 2
    shown = spread(frames, STRIP)
    strips = [[_fit(to_image(clip[k]), own) for k in shown] for clip in media_NFCHW]
    layout = _Layout(cell=cell, columns=min(columns, len(captions)))
    if frames > 1:
        write_clips(path, media_NFCHW, rate)
        layout = _clip_layout(strips, columns * (cell + MARGIN), columns % 2 == 0, frames)
    sheet, boxes = _draw(strips, captions, scores, layout, title)

    # what the grid shows, to be read back
    facts: dict[str, Any] = {
        "factor": max(1, own // side),
        "boxes": [strip[0] for strip in boxes],
        "captions": [str(caption) for caption in captions],
        "scores": [float(s) if np.isfinite(s) else None for s in scores],
    }
    if frames > 1:
        facts |= {"frames": frames, "shown": shown, "strips": boxes, "rate": rate}
    if any(record_of(caption) for caption in captions):
        facts["records"] = [dict(record_of(caption)) for caption in captions]
    words = PngInfo()
    words.add_text(_KEY, json.dumps(facts))
    with replacing(path) as scratch:
        sheet.save(scratch, format="PNG", pnginfo=words)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Sizes of a sheet, in pixels."""

    cell: int
    """Side of the square that a picture fits in; of a clip a frame's width."""
    columns: int
    frames: int = 1
    """Frames side by side in a cell."""
    frame_height: int = 0
    """Of fitted frames; 0 where the cell is square."""
    note: str = ""
    """What stands beside each score."""

    @property
    def width(self) -> int:
        """Of a cell."""
        return self.frames * (self.cell + GAP) - GAP

    @property
    def height(self) -> int:
        """Of a cell without its words."""
        return self.frame_height or self.cell


def _clip_layout(strips: Sequence[Sequence[Image]], width: int, even: bool, frames: int) -> _Layout:
    """Of strips of clips of so many ``frames``, on a sheet of ``width``."""
    shown = len(strips[0])
    cell = strips[0][0].width
    columns = max(1, width // (shown * (cell + GAP) - GAP + MARGIN))
    if even:
        columns = max(2, columns - columns % 2)
    return _Layout(
        cell=cell,
        columns=min(columns, len(strips)),
        frames=shown,
        frame_height=strips[0][0].height,
        note=f"{shown} of {frames} frames" if shown < frames else f"{frames} frames",
    )


Box = tuple[int, int, int, int]
"""(x, y, width, height)."""


def _draw(
    strips: Sequence[Sequence[Image]],
    captions: Sequence[str],
    scores: Sequence[float],
    layout: _Layout,
    title: str,
) -> tuple[Image, list[list[Box]]]:
    """The sheet, and the box of each frame of each cell on it."""
    from PIL import Image, ImageDraw, ImageFont

    # the paper and its title
    rows = -(-len(captions) // layout.columns)
    top = 34 if title else MARGIN
    high = layout.height + LINE * (CAPTION_LINES + 1) + 8
    wide = layout.width
    size = (layout.columns * (wide + MARGIN) + MARGIN, top + rows * (high + MARGIN))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    if title:
        pen.text((MARGIN, 9), title, fill=INK, font=ImageFont.load_default(size=16))

    # each picture in the middle of its cell, the score and the caption below it
    boxes: list[list[Box]] = []
    cells = zip(strips, captions, scores, _colours(scores), strict=True)
    for i, (strip, caption, score, colour) in enumerate(cells):
        x = MARGIN + i % layout.columns * (wide + MARGIN)
        y = top + i // layout.columns * (high + MARGIN)
        boxes.append([])
        for j, picture in enumerate(strip):
            left = x + j * (layout.cell + GAP) + (layout.cell - picture.width) // 2
            corner = (left, y + (layout.height - picture.height) // 2)
            boxes[-1].append((*corner, *picture.size))
            sheet.paste(picture, corner)
        below = y + layout.height + 4
        pen.text((x, below), f"{score:.3f}", fill=colour, font=font)
        pen.text((x + 60, below), layout.note, fill=INK, font=font)
        for j, line in enumerate(textwrap.wrap(caption, wide // 6)[:CAPTION_LINES]):
            pen.text((x, below + LINE * (j + 1)), line, fill=INK, font=font)
    return sheet, boxes


# --- clips beside a grid -------------------------------------------------------------------------


def clips_folder(grid: Path) -> Path:
    """Where a grid's clips are; it is there where the grid shows clips."""
    return grid.with_suffix("")


def clip_files(grid: Path) -> list[Path]:
    """The clips beside a grid, in the order of its cells; none of a grid of pictures."""
    return sorted(clips_folder(grid).glob("[0-9]*.webp"))


def write_clips(grid: Path, media_NFCHW: np.ndarray, rate: float) -> None:
    """Writes clips beside a grid, all or none, in place of any that are there."""
    exact = max(media_NFCHW.shape[-2:]) <= LARGE_CELL
    how = {"lossless": True} if exact else {"quality": 90}
    with replacing(clips_folder(grid)) as scratch:
        scratch.mkdir(parents=True)
        for number, media_FCHW in enumerate(media_NFCHW):
            kept = shrink_clip(Clip(media_FCHW=media_FCHW, rate=rate))
            content = encode_animation(kept.media_FCHW, "webp", kept.rate, **how)
            (scratch / f"{number:03d}.webp").write_bytes(content)


def remove_grid(grid: Path) -> None:
    """Deletes a grid and the clips beside it, where they are there."""
    for file in (grid, *clip_files(grid)):
        file.unlink(missing_ok=True)
    # it is not there, or holds something else
    with contextlib.suppress(OSError):
        clips_folder(grid).rmdir()


def shrink_clip(clip: Clip, most: int = MOST_FRAMES, side: int = LARGE_CELL) -> Clip:
    """At most so many frames, evenly spaced, in the same time, and none larger than ``side``."""
    frames = len(clip.media_FCHW)
    media_FCHW = clip.media_FCHW[spread(frames, most)]
    rate = clip.rate * len(media_FCHW) / frames
    if max(media_FCHW.shape[-2:]) > side:
        fitted = [_fit(to_image(pixels_CHW), side) for pixels_CHW in media_FCHW]
        media_FCHW = np.stack([np.asarray(one) for one in fitted]).transpose(0, 3, 1, 2)
    return Clip(media_FCHW=media_FCHW, rate=rate)


def shrink(media_NFCHW: np.ndarray) -> np.ndarray:
    """(N, F, 3, H, W) uint8 pictures or clips as ``read_grid`` gives them back: large ones shrunk
    to a cell, long ones with fewer frames."""
    clips = [shrink_clip(Clip(media_FCHW=media_FCHW)) for media_FCHW in media_NFCHW]
    return np.stack([clip.media_FCHW for clip in clips])


# --- a grid that is there ------------------------------------------------------------------------


def read_grid(path: Path) -> list[Cell]:
    """The pictures or clips of a grid that ``write_grid`` made, small ones at their own size; none
    for any other PNG. A clip whose file is missing has the frames of its strip."""
    from PIL import Image

    with Image.open(path) as sheet:
        facts = json.loads(sheet.info.get(_KEY, "{}"))
        if not facts:
            return []
        cells = []
        strips = facts.get("strips") or [[box] for box in facts["boxes"]]
        records = facts.get("records") or [{}] * len(strips)
        rows = zip(strips, facts["captions"], records, facts["scores"], strict=True)
        for number, (strip, text, record, score) in enumerate(rows):
            caption = Prompt(text, record) if record else text
            clip = _read_beside(path, number) if len(strip) > 1 else None
            if clip is None:
                clip = _read_strip(sheet, strip, facts)
            cells.append(
                Cell(media_FCHW=clip.media_FCHW, caption=caption, score=score, rate=clip.rate)
            )
        return cells


def _read_beside(grid: Path, number: int) -> Clip | None:
    try:
        return decode_clip(clips_folder(grid) / f"{number:03d}.webp")
    except UnreadablePicture:
        return None


def _read_strip(sheet: Image, strip: Sequence[Box], facts: Mapping[str, Any]) -> Clip:
    """What a cell shows: a picture, or some frames of a clip in the whole clip's time."""
    from PIL.Image import Resampling

    frames = []
    for x, y, width, height in strip:
        size = (width // facts["factor"], height // facts["factor"])
        cut = sheet.crop((x, y, x + width, y + height)).resize(size, Resampling.NEAREST)
        frames.append(np.asarray(cut).transpose(2, 0, 1))
    rate = facts.get("rate", RATE) * len(strip) / facts.get("frames", 1)
    return Clip(media_FCHW=np.ascontiguousarray(np.stack(frames)), rate=rate)


# --- all clips of a grid in one ------------------------------------------------------------------


def join_clips(cells: Sequence[Cell], columns: int = 4) -> Clip:
    """The clips of a grid as one clip, side by side in its order, small ones enlarged by a whole
    factor: for viewers that show one picture at a time."""
    # long and large ones would be too much for a log
    clips = [Clip(media_FCHW=cell.media_FCHW, rate=cell.rate) for cell in cells]
    if max(clips[0].media_FCHW.shape[-2:]) > SMALL_CELL:
        clips = [shrink_clip(clip, SHEET_FRAMES, SHEET_SIDE) for clip in clips]
    frames, _, height, width = clips[0].media_FCHW.shape
    factor = max(1, SMALL_CELL // max(height, width))

    # paper, and each clip on it
    columns = min(columns, len(clips))
    high = height * factor
    wide = width * factor
    rows = -(-len(clips) // columns)
    size = (rows * (high + GAP) + GAP, columns * (wide + GAP) + GAP)
    sheet_FCHW = np.empty((frames, 3, *size), dtype=np.uint8)
    sheet_FCHW[:] = np.array(PAPER, dtype=np.uint8)[:, None, None]
    for number, clip in enumerate(clips):
        y = GAP + number // columns * (high + GAP)
        x = GAP + number % columns * (wide + GAP)
        enlarged = clip.media_FCHW.repeat(factor, axis=2).repeat(factor, axis=3)
        sheet_FCHW[:, :, y : y + high, x : x + wide] = enlarged
    return Clip(media_FCHW=sheet_FCHW, rate=clips[0].rate)


def _colours(scores: Sequence[float]) -> list[tuple[int, int, int]]:
    """Red at the lowest score and where it is missing, green at the highest."""
    known = [s for s in scores if np.isfinite(s)]
    low, spread = (min(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
    colours = []
    for score in scores:
        share = (score - low) / spread if np.isfinite(score) else 0.0
        red, green, blue = (round(b + share * (g - b)) for b, g in zip(BAD, GOOD, strict=True))
        colours.append((red, green, blue))
    return colours


def _fit(picture: Image, cell: int) -> Image:
    from PIL.Image import Resampling

    factor = cell // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Resampling.NEAREST)
    picture.thumbnail((cell, cell), Resampling.LANCZOS)
    return picture
