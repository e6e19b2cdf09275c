"""Captions of the embedded task of moving pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from rlalign.data.motion import KINDS, Kind, Split, captions
from rlalign.data.prompts.base import Prompts, first_of
from rlalign.diffusion.noise import generator


class Motion(Prompts):
    """Captions of moving shapes, such as "a red circle moves right, fast"; those for evaluation
    never occur in training.

    Source: rlalign's own task, ``rlalign/data/motion.py``.
    """

    kinds: tuple[Kind, ...] = Field(
        default=KINDS,
        min_length=1,
        description=(
            "which captions: move (a direction and a speed), turn (two directions), pass (one"
            " object passes another)"
        ),
    )
    limit: int = Field(
        default=0,
        ge=0,
        description="train on a fixed choice of this many captions; 0 is all of them",
    )

    def pool(self) -> Sequence[str]:
        return _shuffled("train", self.kinds, self.limit)

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(_shuffled("held_out", self.kinds, 0), count)


@lru_cache
def _shuffled(split: Split, kinds: tuple[Kind, ...], limit: int) -> tuple[str, ...]:
    """The captions of a split in a fixed shuffled order, so that any beginning of them is a fair
    choice."""
    everything = captions(split, kinds)
    order = generator("motion", split).permutation(len(everything))
    return tuple(everything[i] for i in (order[:limit] if limit else order))
