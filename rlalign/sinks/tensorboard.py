"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.core.clips import Clip, encode_animation
from rlalign.core.pictures import clip_files, join_clips, read_grid
from rlalign.sinks.base import Origin, Sink, Writer


class TensorBoard(Sink):
    """Event files in ``tensorboard/`` of the run folder: every metric, and the evaluation's
    pictures; its clips play side by side in one animated PNG.

    Source: torch.utils.tensorboard.
    """

    def connect(self, origin: Origin) -> Writer:
        return _Writer(origin)


class _Writer:
    """Rounds after ``resume_at`` are hidden where they will be written again."""

    def __init__(self, origin: Origin) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(origin.folder / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=origin.resume_at + 1)

    def write(self, round: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._board.add_scalar(key, value, round)
        self._board.flush()

    def show(self, round: int, picture: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(picture) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
        name = "changes" if picture.stem.endswith("changes") else "samples"
        self._board.add_image(name, pixels_HWC, round, dataformats="HWC")
        if clip_files(picture):
            self._play(f"{name}_clips", join_clips(read_grid(picture)), round)

    def _play(self, name: str, clip: Clip, round: int) -> None:
        """An image as TensorBoard takes it, encoded: a browser plays it."""
        from tensorboard.compat.proto import summary_pb2

        # its classes are made when it is imported
        made: Any = summary_pb2
        _, _, height, width = clip.media_FCHW.shape
        image = made.Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=encode_animation(clip.media_FCHW, "png", clip.rate),
        )
        assert self._board.file_writer is not None, "something was written before"
        self._board.file_writer.add_summary(
            made.Summary(value=[made.Summary.Value(tag=name, image=image)]), round
        )

    def keep(self, file: Path) -> None:
        """The file is in the run folder already, beside the event files."""

    def close(self, ended: bool) -> None:
        self._board.close()
