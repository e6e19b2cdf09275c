"""Grids of pictures with captions and scores, as PNG. A grid can be read back: what it shows is
also written inside it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.core.files import replacing
from rlalign.core.media import to_image

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN = 10
CAPTION_LINES = 3
LINE = 15
SMALL_CELL = 160
LARGE_CELL = 256
PAPER = (250, 250, 248)
INK = (40, 40, 44)
GOOD = (22, 128, 76)
BAD = (190, 60, 50)
_KEY = "rlalign"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid."""

    picture: Image
    """As it was given, or shrunk to the cell where it was larger."""
    caption: str
    score: float | None
    """None where the score was missing."""


def write_grid(
    path: Path,
    media_NCHW: np.ndarray,
    captions: Sequence[str],
    scores: Sequence[float],
    *,
    columns: int = 8,
    title: str = "",
) -> None:
    """uint8 pictures with wrapped captions and coloured scores, written whole or not at all.

    Small pictures are enlarged by a whole factor without smoothing, large ones shrunk. The colour
    runs from red at the lowest to green at the highest score of the grid.
    """
    from PIL.PngImagePlugin import PngInfo

    side = max(media_NCHW.shape[-2:])
    cell = SMALL_CELL if side <= SMALL_CELL else LARGE_CELL
    pictures = [_fit(to_image(pixels_CHW), cell) for pixels_CHW in media_NCHW]
    sheet, boxes = _draw(pictures, captions, scores, cell, min(columns, len(captions)), title)
    # what the grid shows, to be read back
    facts = {
        "factor": max(1, cell // side),
        "boxes": boxes,
        "captions": list(captions),
        "scores": [float(s) if np.isfinite(s) else None for s in scores],
    }
    words = PngInfo()
    words.add_text(_KEY, json.dumps(facts))
    with replacing(path) as scratch:
        sheet.save(scratch, format="PNG", pnginfo=words)


def _draw(
    pictures: Sequence[Image],
    captions: Sequence[str],
    scores: Sequence[float],
    cell: int,
    columns: int,
    title: str,
) -> tuple[Image, list[tuple[int, int, int, int]]]:
    """The sheet, and the box (x, y, width, height) of each picture on it."""
    from PIL import Image, ImageDraw, ImageFont

    # the paper and its title
    rows = -(-len(captions) // columns)
    top = 34 if title else MARGIN
    high = cell + LINE * (CAPTION_LINES + 1) + 8
    size = (columns * (cell + MARGIN) + MARGIN, top + rows * (high + MARGIN))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    if title:
        pen.text((MARGIN, 9), title, fill=INK, font=ImageFont.load_default(size=16))

    # each picture in the middle of its cell, the score and the caption below it
    boxes = []
    cells = zip(pictures, captions, scores, _colours(scores), strict=True)
    for i, (picture, caption, score, colour) in enumerate(cells):
        x = MARGIN + i % columns * (cell + MARGIN)
        y = top + i // columns * (high + MARGIN)
        corner = (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2)
        boxes.append((*corner, *picture.size))
        sheet.paste(picture, corner)
        pen.text((x, y + cell + 4), f"{score:.3f}", fill=colour, font=font)
        for j, line in enumerate(textwrap.wrap(caption, cell // 6)[:CAPTION_LINES]):
            pen.text((x, y + cell + 4 + LINE * (j + 1)), line, fill=INK, font=font)
    return sheet, boxes


def shrink(media_NCHW: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) uint8 pictures as ``read_grid`` gives them back: large ones shrunk to a cell."""
    if max(media_NCHW.shape[-2:]) <= LARGE_CELL:
        return media_NCHW
    fitted = [_fit(to_image(pixels_CHW), LARGE_CELL) for pixels_CHW in media_NCHW]
    return np.stack([np.asarray(picture) for picture in fitted]).transpose(0, 3, 1, 2)


def read_grid(path: Path) -> list[Cell]:
    """The pictures of a grid that ``write_grid`` made, small ones at their own size; none for any
    other PNG."""
    from PIL import Image

    with Image.open(path) as sheet:
        facts = json.loads(sheet.info.get(_KEY, "{}"))
        if not facts:
            return []
        cells = []
        for (x, y, width, height), caption, score in zip(
            facts["boxes"], facts["captions"], facts["scores"], strict=True
        ):
            size = (width // facts["factor"], height // facts["factor"])
            picture = sheet.crop((x, y, x + width, y + height)).resize(
                size, Image.Resampling.NEAREST
            )
            cells.append(Cell(picture=picture, caption=caption, score=score))
        return cells


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
