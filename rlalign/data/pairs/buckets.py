"""Aspect buckets: pictures of many shapes at some forty sizes of nearly one area, so that little is
cut off and batches are still tensors.

Source: Podell 2023 (SDXL), arXiv:2307.01952, section 2.3 and appendix I, whose table of 41 sizes
``buckets_of(1024)`` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = 16
"""Of a side: sizes are multiples of ``size / STEPS`` pixels, of 64 at 1024."""
_LEAST_AREA = 0.9
"""Of a bucket, as a share of the square's."""

Size = tuple[int, int]
"""(height, width) in pixels."""


class Crop(NamedTuple):
    """How a picture was brought to the size of a batch, in pixels."""

    height: int
    """Of the picture as it was."""
    width: int
    top: int
    """Where it was cut, once resized."""
    left: int


@lru_cache
def buckets_of(size: int) -> tuple[Size, ...]:
    """The buckets of about ``size`` squared, from the tallest to the widest: sides between half of
    ``size`` and twice, areas of 0.9 to 1 times the square's.

    Raises ValueError where ``size`` is no multiple of 16.
    """
    if size % STEPS:
        raise ValueError(
            f"size must be a multiple of {STEPS} with resize buckets, whose sides are multiples of"
            f" size / {STEPS}, got {size}"
        )
    sides = range(STEPS // 2, 2 * STEPS + 1)
    square = STEPS * STEPS
    found = [(h, w) for h in sides for w in sides if _LEAST_AREA * square <= h * w <= square]
    step = size // STEPS
    return tuple(sorted(((h * step, w * step) for h, w in found), key=_ratio))


def choose_bucket(sizes: Sequence[Size], size: int) -> Size:
    """The bucket for pictures of these sizes together: the nearest to their aspect ratios in
    logarithms, so that portrait and landscape count alike. Between two the squarer one."""
    wanted = sum(math.log(_ratio(one)) for one in sizes) / len(sizes)

    def distance(bucket: Size) -> tuple[float, float]:
        own = math.log(_ratio(bucket))
        return abs(own - wanted), abs(own)

    return min(buckets_of(size), key=distance)


def cut_out(picture: Image, target: Size) -> tuple[Image, Crop]:
    """The middle of a picture that is resized (bilinear) until it covers ``target``.

    The side that fits takes the target's length and the other's fraction is cut off, as
    torchvision's Resize does.
    """
    from PIL import Image

    # the side that needs the most enlarging decides
    high, wide = target
    width, height = picture.size
    if wide * height >= high * width:
        resized = (wide, int(wide * height / width))
    else:
        resized = (int(high * width / height), high)
    fitted = picture
    if resized != picture.size:
        fitted = picture.resize(resized, Image.Resampling.BILINEAR)

    # the middle of the other
    left = round((resized[0] - wide) / 2)
    top = round((resized[1] - high) / 2)
    found = fitted.crop((left, top, left + wide, top + high))
    return found, Crop(height=height, width=width, top=top, left=left)


def _ratio(size: Size) -> float:
    """Width by height."""
    height, width = size
    return width / height
