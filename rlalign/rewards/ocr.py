"""Written text, read by a neural OCR engine whose weights come inside its package."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from rlalign.core.registry import UserError, read_reason
from rlalign.rewards._written import Reader, WrittenText

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_SIDE = 960
"""Pixels on a picture's longer side above which it is shrunk before lines are looked for."""
_LINE_HEIGHT = 48
"""Pixels to which the recogniser brings a line."""


class Ocr(WrittenText):
    """Share of the wanted text that PP-OCR reads in the picture, 0 to 1: 1 - min(edit distance, n)
    / n for n wanted letters, spaces dropped and case folded.

    Pictures are read one by one, on the CPU: a score does not depend on what else is in the batch.
    The engine reads Latin letters, digits, Chinese and Japanese.

    Weights: PP-OCRv6, inside the package rapidocr (extra ``ocr``); nothing is downloaded.

    Source: Liu 2025, arXiv:2505.05470 (Flow-GRPO), on rendered text; the engine: Cui 2025,
    arXiv:2507.05595 (PaddleOCR 3.0).
    """

    differentiable: ClassVar[bool] = False

    line_width: int = Field(
        default=320,
        ge=_LINE_HEIGHT,
        le=4096,
        description=(
            "pixels to which a line, 48 high, is padded; a narrow one is read several times as fast"
        ),
    )

    def reader(self) -> Reader:
        engine = self._engine()
        # the detector keeps what it works on
        detecting = threading.Lock()

        def read(pictures: Sequence[Image]) -> list[str]:
            return [_text_in(engine, picture, detecting) for picture in pictures]

        def read_lines(pictures: Sequence[Image]) -> list[str]:
            return ["".join(engine(_as_bgr(picture)).txts or ()) for picture in pictures]

        return read if self.detect else read_lines

    def _engine(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except (ImportError, OSError) as error:
            raise UserError(
                f"rewards.{self.title} needs rapidocr and onnxruntime ({read_reason(error)});"
                ' install them: pip install "rlalign[ocr]"'
            ) from error

        threads = "EngineConfig.onnxruntime"
        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": self.detect,
                # what stands on its head stays so, as in the published reward
                "Global.use_cls": False,
                # as the published reward's engine: smaller pictures are not enlarged
                "Det.limit_type": "max",
                "Det.limit_side_len": _LARGEST_SIDE,
                # every line counts, however sure the engine is of it
                "Global.text_score": 0.0,
                "Rec.rec_img_shape": [3, _LINE_HEIGHT, self.line_width],
                # one line a call: in a batch all are padded to the widest
                "Rec.rec_batch_num": 1,
                f"{threads}.intra_op_num_threads": self.threads,
                f"{threads}.inter_op_num_threads": 1,
            }
        )


def _text_in(engine: Any, picture: Image, detecting: threading.Lock) -> str:
    """The lines that are found in a picture, from top to bottom."""
    with detecting:
        return "".join(engine(_as_bgr(picture)).txts or ())


def _as_bgr(picture: Image) -> np.ndarray:
    """(H, W, 3) uint8, blue first, as the engine was trained."""
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])
