"""Captions of the embedded task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from rlalign.data.prompts.base import Prompts, first_of
from rlalign.data.shapes import Split, captions
from rlalign.diffusion.noise import generator


class Shapes(Prompts):
    """Captions of coloured shapes; those for evaluation never occur in training.

    Source: rlalign's own task, ``rlalign/data/shapes.py``.
    """

    limit: int = Field(
        default=0,
        ge=0,
        description="train on a fixed choice of this many captions; 0 is all of them",
    )

    def pool(self) -> Sequence[str]:
        return _shuffled("train", self.limit)

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(_shuffled("held_out", 0), count)


@lru_cache
def _shuffled(split: Split, limit: int) -> tuple[str, ...]:
    """The captions of a split in a fixed shuffled order, so that any beginning of them is a fair
    choice."""
    everything = captions(split)
    order = generator("captions", split).permutation(len(everything))
    return tuple(everything[i] for i in (order[:limit] if limit else order))
