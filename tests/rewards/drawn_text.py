"""Pictures of text in DejaVu Sans, which comes with matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw_text(
    text: str,
    *,
    size: tuple[int, int] = (64, 192),
    pixels: int = 28,
    angle: float = 0.0,
    noise: float = 0.0,
    light_on_dark: bool = False,
) -> np.ndarray:
    """(1, 3, H, W) uint8: ``text`` in the middle, ``pixels`` high, turned by ``angle`` degrees,
    with Gaussian noise of standard deviation ``noise`` grey levels."""
    height, width = size
    ink, paper = (235, 20) if light_on_dark else (20, 235)
    picture = Image.new("L", (width, height), paper)
    font = ImageFont.truetype(str(_FONT), pixels)
    ImageDraw.Draw(picture).text((width // 2, height // 2), text, ink, font, anchor="mm")
    turned = picture.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=paper)
    grey_HW = np.asarray(turned, dtype=np.float64)
    grey_HW = grey_HW + np.random.default_rng(0).normal(0.0, noise, grey_HW.shape)
    return np.repeat(grey_HW.round().clip(0, 255).astype(np.uint8)[None, None], 3, axis=1)
