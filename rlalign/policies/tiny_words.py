"""The embedded model of written text: a Stable Diffusion 3 pipeline of a few million parameters
that draws short words."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.policies.sd3 import StableDiffusion3

ASSET = Path(__file__).parent.parent / "assets" / "tiny_words"


class TinyWords(StableDiffusion3):
    """The shipped 32x32 flow-matching transformer of short words, in Stable Diffusion 3's format;
    captions such as ``the word "CAT"`` are read letter by letter, by the two CLIP encoders alone.

    Made by ``rlalign pretrain configs/pretrain_tiny_words.yaml``.

    Source: Lipman 2022, arXiv:2210.02747 (training); Esser 2024, arXiv:2403.03206 (architecture).
    """

    by_folder: ClassVar[bool] = False

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )
    t5_tokens: int = Field(
        default=0,
        ge=0,
        le=512,
        description=(
            "rows of zeros in T5's place, as a call's max_sequence_length; 256 takes five times as"
            " long"
        ),
    )

    @property
    def location(self) -> str:
        return self.path or str(ASSET)
