"""Prompts from a text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from rlalign.data.prompts.base import Prompts, first_of
from rlalign.registry import UserError


class FilePrompts(Prompts):
    """Prompts from a UTF-8 text file, one on a line; empty lines are skipped. Source: the file named in the run file."""

    path: str = Field(description="text file with the prompts to train on")
    held_out_path: str = Field(
        default="", description="text file with prompts for evaluation; empty takes the first ones"
    )

    def pool(self) -> Sequence[str]:
        return read_prompts(self.path, "prompts.path")

    def held_out(self, count: int) -> list[tuple[int, str]]:
        path = self.held_out_path
        return first_of(read_prompts(path, "prompts.held_out_path") if path else self.pool(), count)


def read_prompts(path: str, place: str) -> list[str]:
    """The prompts in a file; a missing or empty one is a UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place} must be a readable UTF-8 text file, got {path!r} ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{place} must hold at least one prompt, got an empty file {path!r}")
    return prompts
