"""From a row of a table to a prompt: one column is its text, the others are its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError, nearest

COLUMNS = ("prompt", "caption", "text", "prompts", "captions")
"""Names of a column of prompts, the first that a table has is taken; in any case."""
METADATA = "metadata"
"""A column whose value, a JSON object or a string of one, is the record itself: its fields stand in
the record beside those of other columns."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns are read of a table."""

    prompt: str = ""
    """Empty: the first of ``COLUMNS`` that there is."""
    record: tuple[str, ...] | None = None
    """None: every other column."""

    def of(self, names: Iterable[str], where: str, setting: str) -> Columns:
        """The same with the prompts' column chosen among ``names``.

        Raises UserError for a column that there is not; ``where`` is the table, ``setting`` the
        place of the setting that names the column.
        """
        names = list(names)
        for name in self.record or ():
            if name not in names:
                raise UserError(
                    f"{setting.rpartition('.')[0]}.record must name columns of {where}, got"
                    f" {name!r}; {nearest(name, names)}"
                )
        if self.prompt:
            if self.prompt not in names:
                raise UserError(
                    f"{setting} must be a column of {where}, got {self.prompt!r};"
                    f" {nearest(self.prompt, names)}"
                )
            return self
        by_name = {name.strip().lower(): name for name in reversed(names)}
        found = next((by_name[name] for name in COLUMNS if name in by_name), None)
        if found is None:
            raise UserError(
                f"{setting} must name the column of prompts of {where}, where none is called"
                f" {', '.join(COLUMNS[:3])}; its columns: {', '.join(names)[:200] or 'none'}"
            )
        return Columns(prompt=found, record=self.record)

    def takes(self, name: str) -> bool:
        """Whether a column belongs to the record."""
        return name != self.prompt and (self.record is None or name in self.record)


def to_prompt(row: Mapping[str, Any], columns: Columns) -> str:
    """The prompt of a row, whose text must be there; without a record it is a plain string."""
    record = {name: value for name, value in row.items() if columns.takes(name)}
    inside = _mapping(record.get(METADATA))
    if inside is not None:
        del record[METADATA]
        record |= inside
    text = str(row[columns.prompt]).strip()
    return Prompt(text, _finite(record)) if record else text


def _finite(value: Any) -> Any:
    """A value of JSON in which NaN and infinities, which it does not know, are null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(value: Any) -> dict[str, Any] | None:
    """A JSON object, or the one that a string holds; None for anything else."""
    from pydantic_core import from_json

    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = from_json(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None
