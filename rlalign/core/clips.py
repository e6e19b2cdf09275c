"""Clips as files: lossless animated WebP, or PNG of one frame; the one reader of clips that a user
gives.

Encoders of animations keep equal neighbours once, for longer, and one picture alone where all
frames are equal. So a file says itself how many frames each of its pictures stands for (as JSON in
EXIF's ImageDescription), and a frozen clip comes back with all its frames.

Of animated WebP, PNG and GIF that others wrote a picture stands for as many frames as its duration
has of the file's shortest one, rounded. Frames are read as ``rlalign.core.media`` reads pictures.
Any other format gives its first picture, a clip of one frame.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlalign.core.media import (
    UnreadablePicture,
    encode_image,
    open_picture,
    picture_at,
    read_tag,
    to_image,
)

if TYPE_CHECKING:
    from PIL.Image import Image

RATE = 8.0
"""Frames a second of a clip that does not say its own."""
MAX_PIXELS = 2**28
"""Of all frames of a clip together: 672 of 480 x 832."""
_DESCRIPTION = 0x010E
"""EXIF's ImageDescription."""
_KEY = "rlalign"
_ANIMATED = ("WEBP", "PNG", "GIF")

Format = Literal["webp", "png", "gif"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames, and how fast they follow each other."""

    media_FCHW: np.ndarray
    """(F, 3, H, W) uint8; a picture has F = 1."""
    rate: float = RATE
    """Frames a second."""


def encode_clip(media_FCHW: np.ndarray, rate: float = RATE) -> tuple[bytes, str]:
    """(the file, its media type) of uint8 media: PNG of one frame, lossless animated WebP of
    several. ``read_clip`` gives the very frames back."""
    if len(media_FCHW) == 1:
        return encode_image(to_image(media_FCHW[0]), "png"), "image/png"
    return encode_animation(media_FCHW, "webp", rate, lossless=True), "image/webp"


def encode_animation(
    media_FCHW: np.ndarray, format: Format, rate: float = RATE, **settings: Any
) -> bytes:
    """The bytes of an animation that plays for ever, of any number of uint8 frames; ``settings``
    are Pillow's. WebP is lossy unless they say otherwise, GIF has 256 colours a frame."""
    from PIL.Image import Exif

    # equal neighbours are one picture
    starts = [0]
    for number in range(1, len(media_FCHW)):
        if not np.array_equal(media_FCHW[number], media_FCHW[number - 1]):
            starts.append(number)
    held = [after - start for start, after in pairwise([*starts, len(media_FCHW)])]

    # a picture ends on the format's clock, in milliseconds, where its last frame does
    tick = 10 if format == "gif" else 1
    ends = [tick * round(1000 * done / rate / tick) for done in accumulate(held)]
    durations = [end - start for start, end in pairwise([0, *ends])]

    # GIF has no EXIF
    said: dict[str, Any] = {}
    if format != "gif":
        exif = Exif()
        exif[_DESCRIPTION] = json.dumps({_KEY: {"held": held, "rate": rate}})
        said = {"exif": exif}
    first, *others = [to_image(media_FCHW[start]) for start in starts]
    buffer = io.BytesIO()
    first.save(
        buffer,
        format=format.upper(),
        save_all=True,
        append_images=others,
        duration=durations if others else durations[0],
        loop=0,
        **said,
        **settings,
    )
    return buffer.getvalue()


def read_clip(source: bytes | Path) -> np.ndarray:
    """(F, 3, H, W) uint8 of a picture's or a clip's file, or of its bytes. Raises
    UnreadablePicture."""
    return decode_clip(source).media_FCHW


def decode_clip(source: bytes | Path) -> Clip:
    """The frames of a picture's or a clip's file and their rate. Raises UnreadablePicture, also
    where all frames together are too large to be a clip."""
    frames, rate = read_frames(source)
    media_FHWC = np.stack([np.asarray(one) for one in frames])
    return Clip(media_FCHW=np.ascontiguousarray(media_FHWC.transpose(0, 3, 1, 2)), rate=rate)


def read_frames(source: bytes | Path) -> tuple[list[Image], float]:
    """The same frames as Pillow images of mode RGB; equal neighbours may be one object."""
    with open_picture(source) as opened:
        count = int(getattr(opened, "n_frames", 1)) if opened.format in _ANIMATED else 1
        _refuse_many(count, opened.size)

        # of PNG the first picture may be one for readers that play none
        first = 1 if opened.info.get("default_image") and count > 1 else 0
        pictures: list[Image] = []
        durations: list[float] = []
        for number in range(first, count):
            if count > 1:
                opened.seek(number)
            pictures.append(picture_at(opened))
            durations.append(float(opened.info.get("duration") or 0.0))

        # what the file says itself counts where it fits its pictures; one may be a frozen clip
        said = _said_by(read_tag(opened, _DESCRIPTION)) if opened.format in _ANIMATED else None
        held, rate = _timed(durations)
        if said is not None and len(said[0]) == len(pictures):
            held, rate = said
        _refuse_many(sum(held), opened.size)
        each = zip(pictures, held, strict=True)
        return [picture for picture, times in each for _ in range(times)], rate


def _said_by(description: Any) -> tuple[list[int], float] | None:
    """(frames of each picture, rate) as the file says; None where rlalign did not write it."""
    try:
        facts = json.loads(description)[_KEY]
        held = [int(count) for count in facts["held"]]
        rate = float(facts["rate"])
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return None
    return (held, rate) if all(count > 0 for count in held) and 0 < rate < 1000 else None


def _timed(durations: Sequence[float]) -> tuple[list[int], float]:
    """(frames of each picture, rate) by their durations in milliseconds; one without is one
    frame."""
    shortest = min((one for one in durations if one > 0), default=0.0)
    if not shortest:
        return [1] * len(durations), RATE
    return [max(1, round(one / shortest)) for one in durations], 1000.0 / shortest


def _refuse_many(frames: int, size: tuple[int, int]) -> None:
    width, height = size
    if frames * width * height > MAX_PIXELS:
        raise UnreadablePicture(
            f"{frames:,} frames of {width} x {height} have more than {MAX_PIXELS:,} pixels"
        )


def lay_out(media_FCHW: np.ndarray, widest: int) -> tuple[np.ndarray, int]:
    """((3, H', W') all frames of a clip on one sheet, row by row; its columns): as many as fit into
    ``widest`` pixels. What is left over is black."""
    frames, _, height, width = media_FCHW.shape
    columns = min(frames, max(1, widest // width))
    rows = -(-frames // columns)
    sheet_CHW = np.zeros((3, rows * height, columns * width), dtype=np.uint8)
    for number, frame_CHW in enumerate(media_FCHW):
        y = number // columns * height
        x = number % columns * width
        sheet_CHW[:, y : y + height, x : x + width] = frame_CHW
    return sheet_CHW, columns


def spread(frames: int, most: int) -> list[int]:
    """Numbers of at most ``most`` of so many frames, evenly spaced, first and last among them."""
    if frames <= most:
        return list(range(frames))
    return [round(place * (frames - 1) / (most - 1)) for place in range(most)]
