"""The setting that learners and rollout workers have in common: over how many their denoiser is
spread."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Spread(BaseModel):
    """Base of the settings of those that may share a denoiser, of which each process then holds a
    part."""

    shard: Any = Field(default=None, description="what is spread over processes, or over how many")
