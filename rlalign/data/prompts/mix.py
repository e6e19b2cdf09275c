"""Prompts from several sources, each with its share of a round."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError, plugin_field
from rlalign.data.prompts._table import Joined, take_rows
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.diffusion.noise import generator

_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, are spread as evenly as those of any number."""


class SourceShare(BaseModel):
    """A source within a mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(
        gt=0, allow_inf_nan=False, description="of a round's prompts, relative to the other shares"
    )
    label: str = Field(
        default="", description="what the record says; the file's or the source's name when empty"
    )
    prompts: SerializeAsAny[Annotated[Prompts, plugin_field("prompts", "prompts.sources.prompts")]]

    @property
    def title(self) -> str:
        """The label, or the name of the file, or of the source."""
        path: Any = getattr(self.prompts, "path", "")
        return self.label or Path(path).stem or self.prompts.name


class Mix(Prompts):
    """Prompts from several sources, each with its share of every round.

    A round takes of each source its share of ``per_round``, rounded up or down such that the sums
    over the rounds keep to the shares within a few prompts; which prompts, and in which order,
    depends on (seed, round) alone. The record of each says the source. How sources deal by
    themselves (``per_round`` and the like) is of no account.

    Source: the sources named in the run file.
    """

    sources: tuple[SourceShare, ...] = Field(min_length=1, description="sources with their shares")
    field: str = Field(
        default="source", description="field of the record that says the source; empty says nothing"
    )

    @model_validator(mode="after")
    def _have_titles_of_their_own(self) -> Mix:
        titles = [source.title for source in self.sources]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise ValueError(f"sources: {twice!r} appears twice; give one of them a label")
        return self

    def pool(self) -> Sequence[str]:
        return self._joined([source.prompts.pool for source in self.sources])

    def held_out(self, count: int) -> list[tuple[int, str]]:
        # prompt after prompt from the source that is furthest behind its share
        taken = [0] * len(self.sources)
        order = []
        for n in range(1, count + 1):
            behind = [s * n - t for s, t in zip(self._shares, taken, strict=True)]
            order.append(behind.index(max(behind)))
            taken[order[-1]] += 1
        given = [
            iter(self._ask(i, lambda i=i: self.sources[i].prompts.held_out(taken[i])))
            for i in range(len(self.sources))
        ]
        found = [self._labelled(next(given[i])[1], i) for i in order]
        return [(prompt_id(prompt), prompt) for prompt in found]

    def held_out_pool(self) -> Sequence[str] | None:
        pools = [
            self._ask(i, source.prompts.held_out_pool) for i, source in enumerate(self.sources)
        ]
        kept = [pool for pool in pools if pool is not None]
        return _Labelled(kept, [{}] * len(kept)) if kept else None

    def draw(self, seed: int, round: int) -> list[tuple[int, str]]:
        pool = self.pool()
        assert isinstance(pool, _Labelled)
        chosen: list[int] = []
        for i, wanted in enumerate(self.counts(round)):
            begin, end = pool.bounds[i : i + 2].tolist()
            order = generator("prompts", seed, round, i)
            last = len(chosen) + wanted
            while len(chosen) < last:
                chosen += (order.permutation(end - begin)[: last - len(chosen)] + begin).tolist()
        mixed = generator("prompts", seed, round, "mix").permutation(len(chosen))
        found = take_rows(pool, [chosen[i] for i in mixed])
        return [(prompt_id(prompt), prompt) for prompt in found]

    def counts(self, round: int) -> list[int]:
        """How many prompts a round takes of each source.

        Systematic sampling (Madow 1949, doi:10.1214/aoms/1177730140): a point for each prompt,
        evenly spaced on a line on which each source has its share, from a start that differs from
        round to round by the golden ratio.
        """
        ends = np.cumsum([0.0, *self._shares]) * self.per_round
        ends[-1] = self.per_round
        start = (0.5 + round * _GOLDEN) % 1.0
        # a whole number of prompts, found with a rounding error, is that number
        points = [floor(round_off + start) for round_off in np.round(ends, 9).tolist()]
        return np.diff(points).tolist()

    @property
    def _shares(self) -> list[float]:
        total = sum(source.share for source in self.sources)
        return [source.share / total for source in self.sources]

    def _labelled(self, prompt: str, i: int) -> str:
        return _with_fields(prompt, self._fields(i))

    def _fields(self, i: int) -> dict[str, str]:
        return {self.field: self.sources[i].title} if self.field else {}

    def _joined(self, ask: Sequence[Any]) -> _Labelled:
        pools = [self._ask(i, one) for i, one in enumerate(ask)]
        return _Labelled(pools, [self._fields(i) for i in range(len(pools))])

    def _ask(self, i: int, ask: Any) -> Any:
        """What a source says; its errors name the place within the mix."""
        try:
            return ask()
        except UserError as error:
            raise UserError(
                str(error).replace("prompts.", f"prompts.sources.{i}.prompts.", 1)
            ) from error


class _Labelled(Joined):
    """Several pools one after the other; ``fields`` join the records of each one's prompts."""

    def __init__(self, pools: Sequence[Sequence[str]], fields: Sequence[dict[str, str]]) -> None:
        super().__init__(pools)
        self.fields = fields

    def of_pool(self, prompt: str, i: int) -> str:
        return _with_fields(prompt, self.fields[i])


def _with_fields(prompt: str, fields: dict[str, str]) -> str:
    return Prompt(prompt, {**record_of(prompt), **fields}) if fields else prompt
