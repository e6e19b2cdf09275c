"""The embedded model of clips: a Wan pipeline of about a million parameters that draws moving
shapes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.policies.wan import Wan, WanFamily

ASSET = Path(__file__).parent.parent / "assets" / "tiny_video"


class TinyVideoFamily(WanFamily):
    """A live pipeline of clips of 32x32."""

    own_pixels: ClassVar[tuple[int, int]] = (32, 32)


class TinyVideo(Wan):
    """The shipped text-to-video model in Wan's format, trained on clips of 9 frames (``plan.frames:
    9``) of 32x32 with captions such as "a red circle moves right, fast".

    Made by ``rlalign pretrain configs/pretrain_tiny_video.yaml``.

    Source: Wan Team 2025, arXiv:2503.20314 (architecture); Lipman 2022, arXiv:2210.02747
    (training).
    """

    by_folder: ClassVar[bool] = False
    family = TinyVideoFamily

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )
    text_tokens: int = Field(
        default=16,
        ge=1,
        le=512,
        description=(
            "tokens of a prompt, as a call's max_sequence_length; 512, a call's own, are several"
            " times as slow"
        ),
    )

    @property
    def location(self) -> str:
        return self.path or str(ASSET)
