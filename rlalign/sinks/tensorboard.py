"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlalign.sinks.base import Origin, Sink, Writer


class TensorBoard(Sink):
    """Event files in ``tensorboard/`` of the run folder: every metric, and the evaluation's
    pictures.

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

    def keep(self, file: Path) -> None:
        """The file is in the run folder already, beside the event files."""

    def close(self, ended: bool) -> None:
        self._board.close()
