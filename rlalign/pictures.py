"""Grids of pictures with captions and scores, as PNG. A grid can be read back: what it shows is also written inside it."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MARGIN, CAPTION_LINES, LINE = 10, 3, 15
SMALL_CELL, LARGE_CELL = 160, 256
PAPER, INK, GOOD, BAD = (250, 250, 248), (40, 40, 44), (22, 128, 76), (190, 60, 50)
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

    Small pictures are enlarged by a whole factor without smoothing, large ones shrunk. The colour runs from red at the lowest
    to green at the highest score of the grid.
    """
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    side = max(media_NCHW.shape[-2:])
    cell = SMALL_CELL if side <= SMALL_CELL else LARGE_CELL
    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    top = 34 if title else MARGIN
    high = cell + LINE * (CAPTION_LINES + 1) + 8
    sheet = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, top + rows * (high + MARGIN)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    if title:
        pen.text((MARGIN, 9), title, fill=INK, font=ImageFont.load_default(size=16))
    colours, boxes = _colours(scores), []
    for i, (pixels_CHW, caption, score) in enumerate(zip(media_NCHW, captions, scores, strict=True)):
        x, y = MARGIN + i % columns * (cell + MARGIN), top + i // columns * (high + MARGIN)
        picture = _fitted(Image.fromarray(pixels_CHW.transpose(1, 2, 0)), cell)
        boxes.append((x + (cell - picture.width) // 2, y + (cell - picture.height) // 2, picture.width, picture.height))
        sheet.paste(picture, boxes[-1][:2])
        pen.text((x, y + cell + 4), f"{score:.3f}", fill=colours[i], font=font)
        for j, line in enumerate(textwrap.wrap(caption, cell // 6)[:CAPTION_LINES]):
            pen.text((x, y + cell + 4 + LINE * (j + 1)), line, fill=INK, font=font)
    known = [float(s) if np.isfinite(s) else None for s in scores]
    facts = {"factor": max(1, cell // side), "boxes": boxes, "captions": list(captions), "scores": known}
    words = PngImagePlugin.PngInfo()
    words.add_text(_KEY, json.dumps(facts))
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    sheet.save(scratch, format="PNG", pnginfo=words)
    os.replace(scratch, path)


def read_grid(path: Path) -> list[Cell]:
    """The pictures of a grid that ``write_grid`` made, small ones at their own size; none for any other PNG."""
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
            picture = sheet.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.NEAREST)
            cells.append(Cell(picture=picture, caption=caption, score=score))
        return cells


def _colours(scores: Sequence[float]) -> list[tuple[int, int, int]]:
    """Red at the lowest score and where it is missing, green at the highest."""
    known = [s for s in scores if np.isfinite(s)]
    low, spread = (min(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
    shares = [(s - low) / spread if np.isfinite(s) else 0.0 for s in scores]
    red, green, blue = ([round(b + share * (g - b)) for share in shares] for b, g in zip(BAD, GOOD, strict=True))
    return list(zip(red, green, blue, strict=True))


def _fitted(picture: Image, cell: int) -> Image:
    from PIL.Image import Resampling

    factor = cell // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Resampling.NEAREST)
    picture.thumbnail((cell, cell), Resampling.LANCZOS)
    return picture
