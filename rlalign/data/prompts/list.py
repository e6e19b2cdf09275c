"""Prompts written in the run file."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from rlalign.data.prompts.base import Prompts, first_of


class ListedPrompts(Prompts):
    """Prompts given in the run file itself. Source: the run file."""

    prompts: tuple[str, ...] = Field(min_length=1, description="the prompts")
    held_out_prompts: tuple[str, ...] = Field(
        default=(), description="prompts for evaluation; empty takes the first ones"
    )

    @field_validator("prompts", "held_out_prompts")
    @classmethod
    def _are_text(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for number, prompt in enumerate(prompts):
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise ValueError(
                    f"prompt {number} must be text, got half of a surrogate pair in {prompt!r}"
                )
        return prompts

    def pool(self) -> Sequence[str]:
        return self.prompts

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(self.held_out_prompts or self.prompts, count)

    def held_out_pool(self) -> Sequence[str] | None:
        return self.held_out_prompts or None
