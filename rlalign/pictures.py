"""Grids of pictures with captions and scores, as PNG."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CELL, MARGIN, CAPTION_LINES, LINE = 160, 10, 3, 15
PAPER, INK, GOOD, BAD = (250, 250, 248), (40, 40, 44), (22, 128, 76), (190, 60, 50)


def write_grid(
    path: Path, media_NCHW: np.ndarray, captions: Sequence[str], scores: Sequence[float], *, columns: int = 8, title: str = ""
) -> None:
    """uint8 pictures with wrapped captions and coloured scores, written whole or not at all.

    Small pictures are enlarged by a whole factor without smoothing, large ones shrunk. The colour runs from red at the lowest
    to green at the highest score of the grid.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    top = 34 if title else MARGIN
    width = columns * (CELL + MARGIN) + MARGIN
    high = CELL + LINE * (CAPTION_LINES + 1) + 8
    sheet = Image.new("RGB", (width, top + rows * (high + MARGIN)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    if title:
        pen.text((MARGIN, 9), title, fill=INK, font=ImageFont.load_default(size=16))
    known = [s for s in scores if np.isfinite(s)]
    low, spread = (min(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
    for i, (pixels_CHW, caption, score) in enumerate(zip(media_NCHW, captions, scores, strict=True)):
        x, y = MARGIN + i % columns * (CELL + MARGIN), top + i // columns * (high + MARGIN)
        sheet.paste(_fitted(Image.fromarray(pixels_CHW.transpose(1, 2, 0))), (x, y))
        share = (score - low) / spread if np.isfinite(score) else 0.0
        colour = tuple(round(b + share * (g - b)) for b, g in zip(BAD, GOOD, strict=True))
        pen.text((x, y + CELL + 4), f"{score:.3f}", fill=colour, font=font)
        for j, line in enumerate(textwrap.wrap(caption, 26)[:CAPTION_LINES]):
            pen.text((x, y + CELL + 4 + LINE * (j + 1)), line, fill=INK, font=font)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    sheet.save(scratch, format="PNG")
    os.replace(scratch, path)


def _fitted(picture: object) -> object:
    from PIL import Image

    assert isinstance(picture, Image.Image)
    factor = CELL // max(picture.size)
    if factor >= 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell
