"""Lists of preference pairs in JSON that name picture files: as HPD v2 has them, and as pairs of
``chosen`` and ``rejected``.

A ``.json`` file is one list, a ``.jsonl`` file has an entry a line. What an entry says becomes rows
in the columns of Pick-a-Pic: the words are held in memory, the pictures stay files.

========================================== =====================================================
entry                                      rows
========================================== =====================================================
prompt, chosen, rejected                   one
prompt, file_path, human_preference        the preferred (1) against each of the others (0); of
                                           two pictures that are both or neither a tie
prompt, image_path, rank                   all pairs; the smaller rank is preferred, the same is a
                                           tie
========================================== =====================================================

``file_path`` and ``image_path`` mean the same, and so do ``prompt`` and ``caption``. Paths are
named from the list's folder, or from the folder beside it that has its name (``train/`` of
``train.json``).

Source of the two with lists: Wu 2023, arXiv:2306.09341, the files train.json and test.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.core.files import (
    UnreadableText,
    join_surrogates,
    parse_strict_json,
    read_text,
    split_lines,
)
from rlalign.core.registry import UserError, read_reason

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".json", ".jsonl")
_GROUP = 256
"""Rows that are read at once, as a row group of a Parquet file is."""
_FORMS = (
    "prompt, chosen and rejected; prompt, file_path and human_preference; or prompt, image_path and"
    " rank"
)

Row = tuple[str, str, str, float]
"""Caption, both pictures' paths, and label 0."""


def is_list(file: Path) -> bool:
    """Whether a file is a list in JSON, by its name."""
    return file.suffix.lower() in ENDINGS


def sizes_of(file: Path) -> list[int]:
    """Rows of each group of a list."""
    count = _table(file).num_rows
    return [min(_GROUP, count - start) for start in range(0, count, _GROUP)]


def open_list(
    file: Path, columns: Sequence[str], *, groups: Sequence[int] | None, batch: int
) -> Iterator[pa.RecordBatch]:
    """Record batches of a list's rows, as ``columns.open_pairs`` gives them of a Parquet file."""
    table = _table(file)
    chosen = range(len(sizes_of(file))) if groups is None else groups
    there = [name for name in columns if name in table.column_names]
    for group in chosen:
        part = table.slice(group * _GROUP, _GROUP).select(there).combine_chunks()
        yield from part.to_batches(max_chunksize=batch)


def _table(file: Path) -> pa.Table:
    """The rows of a list. A list is parsed once, and again where the file has changed."""
    try:
        state = file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {read_reason(error)}") from error
    return _parsed(str(file), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _parsed(name: str, changed: int, size: int) -> pa.Table:
    import pyarrow as pa

    # the entries' rows, one after another
    file = Path(name)
    rows: list[Row] = []
    for number, entry in enumerate(_entries(file)):
        rows.extend(_rows_of(entry, f"{file}: entry {number}"))
    if not rows:
        raise UserError(f"{file} must hold at least one pair, and is empty")
    prefix = _folder_of_pictures(file, rows[0][1])

    # as columns of Pick-a-Pic, whose pictures are files
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    captions, firsts, seconds, labels = zip(*rows, strict=True)
    columns = {"caption": pa.array(captions, pa.string())}
    for name, paths in (("jpg_0", firsts), ("jpg_1", seconds)):
        pictures = [{"bytes": None, "path": prefix + path} for path in paths]
        columns[name] = pa.array(pictures, struct)
    columns["label_0"] = pa.array(labels)
    columns["label_1"] = pa.array([1.0 - label for label in labels])
    return pa.table(columns)


def _folder_of_pictures(file: Path, first: str) -> str:
    """What stands before each path: nothing, or the folder that has the list's name and the first
    picture."""
    beside = file.parent / file.stem
    if not (file.parent / first).exists() and (beside / first).exists():
        return f"{file.stem}/"
    return ""


def _entries(file: Path) -> Iterator[Any]:
    try:
        text = read_text(file)
        if file.suffix.lower() == ".jsonl":
            for number, line in enumerate(split_lines(text), start=1):
                if line.strip():
                    yield _loads(line, f"line {number}")
            return
        found = _loads(text, "")
    except (OSError, UnreadableText) as error:
        raise UserError(f"{file} must be text in UTF-8: {read_reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{file} must be JSON ({error}); mend it, or write it again") from error
    if not isinstance(found, list):
        raise UserError(
            f"{file} must hold a list of pairs, got a {type(found).__name__}; a file with an entry"
            " a line is named .jsonl"
        )
    yield from found


def _loads(text: str, place: str) -> Any:
    try:
        return parse_strict_json(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}" if place else str(error)) from error


def _rows_of(entry: Any, place: str) -> list[Row]:
    """The pairs of an entry. Raises UserError where it is of none of the three forms."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{place} must be a mapping with {_FORMS}, got {_shown(entry)}")
    caption = _text(entry.get("prompt", entry.get("caption")), f"{place}: the caption (prompt)")

    # two pictures, the preferred one named
    if "chosen" in entry and "rejected" in entry:
        chosen, rejected = _paths([entry["chosen"], entry["rejected"]], place)
        return [(caption, chosen, rejected, 1.0)]

    # any number of pictures with a number each
    given = entry.get("file_path", entry.get("image_path"))
    key = next((k for k in ("human_preference", "rank") if k in entry), "")
    if given is None or not key:
        raise UserError(f"{place} must have {_FORMS}, got {', '.join(map(str, entry))}")
    names = _paths(given, place)
    said = entry[key]
    if not isinstance(said, list) or not all(isinstance(one, int | float) for one in said):
        raise UserError(f"{place} must have a list of numbers under {key}, got {_shown(said)}")
    if len(said) != len(names) or len(names) < 2:
        raise UserError(
            f"{place} must have two pictures or more, and a number of {key} for each, got"
            f" {len(names)} and {len(said)}"
        )
    worth = said if key == "human_preference" else [-rank for rank in said]

    # of several pictures of which one was picked, the others were not compared
    picked_one = key == "human_preference" and len(names) > 2
    return [
        (caption, names[i], names[j], _label(worth[i], worth[j]))
        for i, j in combinations(range(len(names)), 2)
        if not (picked_one and worth[i] == worth[j])
    ]


def _label(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def _paths(names: Any, place: str) -> list[str]:
    if not isinstance(names, list):
        raise UserError(f"{place} must name its pictures in a list of paths, got {_shown(names)}")
    return [_text(name, f"{place}: a picture's path") for name in names]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place} must be text, got {_shown(value)}")
    try:
        return join_surrogates(value)
    except UnreadableText as error:
        raise UserError(f"{place} must be text: {error}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
