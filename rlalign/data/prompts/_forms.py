"""Which form a file of prompts has, told by its name and its beginning."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rlalign.core.files import MARK, split_lines
from rlalign.data.prompts._rows import COLUMNS

LINES = "JSON lines"
ENDINGS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
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
_SEPARATORS = ((",", "CSV"), ("\t", "TSV"), (";", "CSV"))
_HEAD = 2**18
"""Bytes of a file by which its form is told."""
_LARGEST_JSON = 2**26


class Form(NamedTuple):
    """What a file is."""

    kind: str
    """"" where its lines are prompts."""
    separator: str = ""
    """Of the cells of CSV and TSV."""


def form_of(file: Path) -> Form:
    """The form of a file. Raises OSError where it cannot be read."""
    with file.open("rb") as opened:
        start = opened.read(_HEAD)
        more = opened.read(1)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    kind = kind or ENDINGS.get(file.suffix.lower(), "")
    if kind and kind not in ("CSV", "TSV"):
        return Form(kind)

    # the rest is told by whole lines
    if more:
        start = start[: max(start.rfind(b"\n"), start.rfind(b"\r")) + 1]
    text = start.decode("utf-8", errors="ignore").removeprefix(MARK)
    lines = [line for line in split_lines(text) if line.strip()]
    if kind:
        first = lines[0] if lines else ""
        separators = [separator for separator, name in _SEPARATORS if name == kind]
        return Form(kind, max(separators, key=first.count))
    return _form_of_lines(lines, file) if lines else Form("")


def _form_of_lines(lines: Sequence[str], file: Path) -> Form:
    """The form of a text of unknown ending.

    JSON is one list or object; JSON lines are one of them on each line. CSV and TSV begin with a
    line of two or more short names, one of which is that of a column of prompts, and have as many
    cells in every other line.
    """
    if lines[0].lstrip()[0] in "[{":
        if all(isinstance(_json(line), list | dict) for line in lines):
            # one line is a list of all prompts, or the only row
            alone = len(lines) == 1 and isinstance(_json(lines[0]), list)
            return Form("JSON" if alone else LINES)
        small = file.stat().st_size <= _LARGEST_JSON
        text = file.read_text(encoding="utf-8-sig", errors="ignore") if small else ""
        if isinstance(_json(text), list | dict):
            return Form("JSON")
    for separator, kind in _SEPARATORS:
        names = [name.strip().strip('"').lower() for name in lines[0].split(separator)]
        are_names = len(names) > 1 and all(len(name.split()) <= 2 for name in names)
        if are_names and set(names) & set(COLUMNS) and _cells(lines, separator) == {len(names)}:
            return Form(kind, separator)
    return Form("")


def _cells(lines: Sequence[str], separator: str) -> set[int]:
    """The numbers of cells that the lines of a table have; none where they are no CSV."""
    try:
        return {len(row) for row in csv.reader(lines, delimiter=separator) if row}
    except csv.Error:
        return set()


def _json(text: str) -> object:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
