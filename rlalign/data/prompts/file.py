"""Prompts from a file, or from a folder of shards: text lines, JSON lines, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from rlalign.core.locations import LocalPattern
from rlalign.core.registry import Before, UserError
from rlalign.data.prompts._forms import LINES, form_of
from rlalign.data.prompts._lines import CsvRows, JsonLines, TextLines
from rlalign.data.prompts._parquet import ParquetRows
from rlalign.data.prompts._rows import Columns
from rlalign.data.prompts._shards import shards_of
from rlalign.data.prompts._table import Choice, Joined, PromptTable
from rlalign.data.prompts.base import Overlap, Prompts, first_of, split_by_text


class FilePrompts(Prompts):
    """Prompts from a file: UTF-8 text with one on a line, JSON lines, CSV, TSV or Parquet; or from
    a folder or a glob of such files, in the order of their names.

    Of a table one column is the prompts, and the others are each prompt's record. Rows without a
    prompt are skipped, as empty lines are. However long the file is, no more of it is in memory
    than what a round asks for and 16 bytes a prompt.

    Source: the file named in the run file.
    """

    path: LocalPattern = Field(
        description="file with the prompts to train on; or a folder of shards, or a glob"
    )
    held_out_path: LocalPattern = Field(
        default="",
        description="the same with prompts for evaluation; empty takes the first ones",
    )
    column: Annotated[str, Before("")] = Field(
        default="",
        description="a table's column of prompts; empty takes prompt, caption or text",
    )
    record: Annotated[tuple[str, ...] | None, Before(None)] = Field(
        default=None, description="a table's columns that make the record; all others by default"
    )
    held_out_share: Annotated[float, Before(0.0)] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="this share of the prompts is for evaluation alone, chosen by their text",
    )

    @model_validator(mode="after")
    def _is_held_out_once(self) -> FilePrompts:
        if self.held_out_share and self.held_out_path:
            raise ValueError(
                f"held_out_share must be 0 with held_out_path, got {self.held_out_share:g}: either"
                " part of the file or another one is for evaluation"
            )
        return self

    def pool(self) -> Sequence[str]:
        table = self._read(self.path, "prompts.path")
        return self._part(table, held_out=False) if self.held_out_share else table

    def held_out(self, count: int) -> list[tuple[int, str]]:
        apart = self.held_out_pool()
        return first_of(self.pool() if apart is None else apart, count)

    def held_out_pool(self) -> Sequence[str] | None:
        if self.held_out_share:
            return self._part(self._read(self.path, "prompts.path"), held_out=True)
        path = self.held_out_path
        return self._read(path, "prompts.held_out_path") if path else None

    def find_overlap(self) -> Overlap | None:
        # equal texts are on one side
        return None if self.held_out_share else super().find_overlap()

    def _read(self, path: str, place: str) -> PromptTable:
        return read_prompts(path, place, column=self.column, record=self.record)

    def _part(self, table: PromptTable, *, held_out: bool) -> Choice:
        part = _parts(table, self.held_out_share)[held_out]
        if not len(part):
            what = "for evaluation" if held_out else "to train on"
            raise UserError(
                f"prompts.held_out_share must leave a prompt {what}, got"
                f" {self.held_out_share:g} of {len(table):,} in {self.path!r}"
            )
        return part


def read_prompts(
    path: str, place: str, column: str = "", record: tuple[str, ...] | None = None
) -> PromptTable:
    """The prompts of a file, or of a folder's or a glob's shards one after the other, which are
    read when they are asked for.

    Raises UserError for what is missing, empty or unreadable, and for a table that has no column of
    prompts; ``place`` is the setting that names the file.
    """
    try:
        shards = shards_of(path, place)
        found = [file.stat() for file in shards]
        stamps = tuple((f.st_ino, f.st_size, f.st_mtime_ns) for f in found)
        return _opened(path, tuple(shards), stamps, place, Columns(prompt=column, record=record))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        named = getattr(error, "filename", None) or path
        raise UserError(
            f"{place} must be a readable UTF-8 text file, got {str(named)!r} ({error})"
        ) from error


@lru_cache(maxsize=16)
def _opened(
    path: str,
    shards: tuple[Path, ...],
    stamps: tuple[tuple[int, int, int], ...],
    place: str,
    columns: Columns,
) -> PromptTable:
    """The files as they were at ``stamps``; a round does not look for their lines again."""
    tables: list[PromptTable] = []
    for shard in shards:
        tables.append(_open_table(shard, place, columns))
        # the first one says which column is the prompts
        columns = getattr(tables[-1], "columns", columns)
    table = tables[0] if len(tables) == 1 else Joined(tables)
    if not len(table):
        raise UserError(f"{place} must hold at least one prompt, got an empty file {path!r}")
    return table


def _open_table(file: Path, place: str, columns: Columns) -> PromptTable:
    """The prompts of one file."""
    form = form_of(file)
    if not form.kind:
        return TextLines(file)
    if form.kind == LINES:
        return JsonLines(file, columns, place)
    if form.kind == "Parquet":
        return ParquetRows(file, columns, place)
    if form.separator:
        return CsvRows(file, form.separator, columns, place)
    raise UserError(
        f"{place} must be text lines, JSON lines, CSV or Parquet, got {str(file)!r}, which is a"
        f" table that is not read ({form.kind}); write it as one of these"
    )


@lru_cache(maxsize=4)
def _parts(table: PromptTable, share: float) -> tuple[Choice, Choice]:
    """What is trained on, and what is held out."""
    held_out = split_by_text(table, share)
    return Choice(table, np.flatnonzero(~held_out)), Choice(table, np.flatnonzero(held_out))
