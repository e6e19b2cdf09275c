"""Clips as MP4 files, to show elsewhere: lossy, and so never read as data.

Needs PyAV (the extra ``video``).
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from rlalign.core.clips import Clip, decode_clip
from rlalign.core.files import write_whole
from rlalign.core.registry import UserError

QUALITY = 12
"""x264's constant rate factor: 0 is exact, 23 its own default, 51 the worst."""


def refuse_missing_encoder(place: str) -> None:
    """Raises UserError at ``place`` where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{place} needs the package av; pip install 'rlalign[video]', or leave it out: clips"
            " are written as lossless animated WebP anyway"
        ) from error


def encode_mp4(clip: Clip) -> bytes:
    """An MP4 file of H.264 that browsers and slides play, its colours at half resolution. Of odd
    sides the last row or column appears twice."""
    from av import VideoFrame
    from av import open as open_container

    media_FCHW = clip.media_FCHW
    height, width = media_FCHW.shape[-2:]
    even_FCHW = np.pad(media_FCHW, ((0, 0), (0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    buffer = io.BytesIO()
    with open_container(buffer, "w", format="mp4") as container:
        rate = Fraction(clip.rate).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(QUALITY)})
        stream.height, stream.width = even_FCHW.shape[-2:]
        stream.pix_fmt = "yuv420p"
        for frame_CHW in even_FCHW:
            pixels_HWC = np.ascontiguousarray(frame_CHW.transpose(1, 2, 0))
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_mp4s(folder: Path) -> list[Path]:
    """Writes NAME.mp4 beside each clip NAME.webp of a folder, and gives these files."""
    written: list[Path] = []
    for file in sorted(folder.glob("*.webp")):
        written.append(file.with_suffix(".mp4"))
        write_whole(written[-1], encode_mp4(decode_clip(file)))
    return written
