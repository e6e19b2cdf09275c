"""The embedded model: a Stable Diffusion pipeline of a few million parameters that draws coloured
shapes, shipped in assets."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.policies.stable_diffusion import StableDiffusion

ASSET = Path(__file__).parent.parent / "assets" / "tiny"


class Tiny(StableDiffusion):
    """The shipped 32x32 text-to-image model of coloured shapes, in Stable Diffusion's format; made
    by ``rlalign pretrain``.

    Source: Ho 2020, arXiv:2006.11239 (training); Rombach 2022, arXiv:2112.10752 (architecture).
    """

    by_folder: ClassVar[bool] = False

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )

    @property
    def location(self) -> str:
        return self.path or str(ASSET)
