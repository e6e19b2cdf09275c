"""The embedded flow model: a Stable Diffusion 3 pipeline of a few million parameters that draws
coloured shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.registry import Before
from rlalign.policies.sd3 import StableDiffusion3

ASSET = Path(__file__).parent.parent / "assets" / "tiny_flow"


class TinyFlow(StableDiffusion3):
    """The shipped 32x32 flow-matching transformer of coloured shapes, in Stable Diffusion 3's
    format; captions are read by the two CLIP encoders alone.

    Made by ``rlalign pretrain configs/pretrain_tiny_flow.yaml``.

    Source: Lipman 2022, arXiv:2210.02747 (training); Esser 2024, arXiv:2403.03206 (architecture).
    """

    by_folder: ClassVar[bool] = False

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )
    t5_tokens: Annotated[int, Before(0)] = Field(
        default=256,
        ge=0,
        le=512,
        description=(
            "rows of zeros in T5's place, as a call's max_sequence_length; 0 is a fifth of the time"
        ),
    )

    @property
    def location(self) -> str:
        return self.path or str(ASSET)
