"""What a source of prompts is, and how prompts become units of work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import Recipe
from rlalign.diffusion.noise import generator


def prompt_id(text: str) -> int:
    """A stable number of a prompt's text, in [0, 2^63)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Prompts(Recipe):
    """Base of a source: how many prompts a round takes, and how they are dealt to units."""

    shelf: ClassVar[str] = "prompts"

    per_round: int = Field(default=16, ge=1, description="prompts in a round")
    samples_per_prompt: int = Field(default=4, ge=1, description="samples of each prompt")
    per_unit: int = Field(
        default=4, ge=1, description="prompts in one unit of work; must divide per_round"
    )

    @model_validator(mode="after")
    def _deals_evenly(self) -> Prompts:
        if self.per_round % self.per_unit:
            raise ValueError(
                f"per_unit must divide per_round ({self.per_round}), got {self.per_unit}"
            )
        return self

    def pool(self) -> Sequence[str]:
        """Every prompt that may be trained on."""
        raise NotImplementedError

    def held_out(self, count: int) -> list[tuple[int, str]]:
        """``count`` fixed (id, prompt) for evaluation, disjoint from the pool where the source
        can."""
        raise NotImplementedError

    def draw(self, seed: int, round: int) -> list[tuple[int, str]]:
        """The (id, prompt) of a round: without replacement while the pool lasts, by (seed, round)
        alone."""
        pool = self.pool()
        order = generator("prompts", seed, round)
        chosen: list[int] = []
        while len(chosen) < self.per_round:
            chosen += order.permutation(len(pool))[: self.per_round - len(chosen)].tolist()
        return [(prompt_id(pool[i]), pool[i]) for i in chosen]

    def units(self, seed: int, round: int, plan: Plan) -> list[Unit]:
        """The units of a training round. A prompt that is drawn twice gets samples of its own each
        time."""
        drawn = self.draw(seed, round)
        used: dict[int, int] = {}
        rows: list[tuple[int, str, int]] = []
        for number, text in drawn:
            first = used.get(number, 0)
            used[number] = first + self.samples_per_prompt
            last = first + self.samples_per_prompt
            rows += [(number, text, sample) for sample in range(first, last)]
        size = self.per_unit * self.samples_per_prompt
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            Unit.of_rows(UnitKey("train", round, index), part, seed, plan)
            for index, part in enumerate(parts)
        ]


def first_of(prompts: Sequence[str], count: int) -> list[tuple[int, str]]:
    """The first ``count`` prompts with their ids, starting over when there are fewer."""
    return [(prompt_id(prompts[i % len(prompts)]), prompts[i % len(prompts)]) for i in range(count)]
