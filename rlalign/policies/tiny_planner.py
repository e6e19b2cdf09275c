"""The embedded planner: way points through UMaze, shipped in assets."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlalign.core.locations import LocalPath
from rlalign.policies.planner import Planner

ASSET = Path(__file__).parent.parent / "assets" / "tiny_planner"


class TinyPlanner(Planner):
    """The shipped planner of 32 way points through PointMaze's UMaze.

    Made by ``rlalign pretrain configs/pretrain_tiny_planner.yaml``.

    Source: Janner 2022, arXiv:2205.09991 (Diffuser), with way points alone.
    """

    path: LocalPath = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )

    @property
    def location(self) -> str:
        return self.path or str(ASSET)
