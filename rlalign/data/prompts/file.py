"""Prompts from a text file."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from rlalign.core.files import read_text, split_lines
from rlalign.core.locations import LocalPath
from rlalign.core.registry import UserError
from rlalign.data.prompts.base import Prompts, first_of

_TABLES = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".tab": "TSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".xls": "a spreadsheet",
    ".xlsx": "a spreadsheet",
    ".ods": "a spreadsheet",
}
"""A file's ending -> what it is."""
_MAGIC = {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
"""How a file begins -> what it is."""
_HEADERS = ("prompt", "prompts", "caption", "captions", "text")
"""Names of a column of prompts, by which the first line of a text file shows that it is a table."""


class FilePrompts(Prompts):
    """Prompts from a UTF-8 text file, one on a line; empty lines are skipped.

    Source: the file named in the run file. Tables (CSV, JSON lines and the like) are refused.
    """

    path: LocalPath = Field(description="text file with the prompts to train on")
    held_out_path: LocalPath = Field(
        default="", description="text file with prompts for evaluation; empty takes the first ones"
    )

    def pool(self) -> Sequence[str]:
        return read_prompts(self.path, "prompts.path")

    def held_out(self, count: int) -> list[tuple[int, str]]:
        path = self.held_out_path
        return first_of(read_prompts(path, "prompts.held_out_path") if path else self.pool(), count)


def read_prompts(path: str, place: str) -> list[str]:
    """The prompts in a file; a missing, empty or unreadable one, and a table, is a UserError."""
    file = Path(path)

    # a table may be known by its name or its first bytes
    try:
        found = _TABLES.get(file.suffix.lower(), "") if file.is_file() else ""
        found = found or _magic(file)
        text = "" if found else read_text(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place} must be a readable UTF-8 text file, got {path!r} ({error})"
        ) from error

    # a table as text is known by its lines
    found = found or table_kind(text)
    if found:
        raise UserError(
            f"{place} must be a text file with one prompt on a line, got {path!r}, which is a table"
            f" ({found}); write its column of prompts to a text file, one on a line, and name that"
        )

    # empty lines are no prompts
    prompts = [line.strip() for line in split_lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"{place} must hold at least one prompt, got an empty file {path!r}")
    return prompts


def table_kind(text: str) -> str:
    """What kind of table a text is: JSON, JSON lines, CSV or TSV; "" where its lines are prompts.

    JSON is one list or object; JSON lines are one of them on each line. CSV and TSV begin with a
    line of two or more short names, one of which is that of a column of prompts, and have as many
    cells in every other line.
    """
    lines = [line for line in split_lines(text) if line.strip()]
    if not lines:
        return ""
    if lines[0].lstrip()[0] in "[{":
        if isinstance(_json(text), list | dict):
            return "JSON"
        if all(isinstance(_json(line), list | dict) for line in lines):
            return "JSON lines"
    for separator, kind in ((",", "CSV"), ("\t", "TSV"), (";", "CSV")):
        names = [name.strip().strip('"').lower() for name in lines[0].split(separator)]
        are_names = len(names) > 1 and all(len(name.split()) <= 2 for name in names)
        if are_names and set(names) & set(_HEADERS) and _cells(lines, separator) == {len(names)}:
            return kind
    return ""


def _cells(lines: Sequence[str], separator: str) -> set[int]:
    """The numbers of cells that the lines of a table have; none where they are no CSV."""
    try:
        return {len(row) for row in csv.reader(lines, delimiter=separator) if row}
    except csv.Error:
        return set()


def _magic(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(8)
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def _json(text: str) -> object:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
