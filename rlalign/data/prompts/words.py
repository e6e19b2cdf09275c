"""Captions of the embedded task of written text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic import Field

from rlalign.core.prompts import Prompt
from rlalign.data.prompts.base import Prompts, first_of
from rlalign.data.words import Split, caption, words
from rlalign.diffusion.noise import generator


class Words(Prompts):
    """Captions such as ``the word "CAT"``, whose record holds the text; words for evaluation never
    occur in training, and their letters do, at the same places.

    Source: rlalign's own task, ``rlalign/data/words.py``.
    """

    limit: int = Field(
        default=0, ge=0, description="train on a fixed choice of this many words; 0 is all of them"
    )

    def pool(self) -> Sequence[str]:
        return _shuffled("train", self.limit)

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(_shuffled("held_out", 0), count)


@lru_cache
def _shuffled(split: Split, limit: int) -> tuple[Prompt, ...]:
    """The captions of a split in a fixed shuffled order, so that any beginning of them is a fair
    choice."""
    everything = words(split)
    order = generator("words", split).permutation(len(everything))
    chosen = [everything[i] for i in (order[:limit] if limit else order)]
    return tuple(Prompt(caption(word), {"text": word}) for word in chosen)
