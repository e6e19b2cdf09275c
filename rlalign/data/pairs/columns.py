"""Files of preference pairs: Parquet in the columns of Pick-a-Pic v2, written whole or not at all,
read in row batches; and the lists in JSON of ``listed``, read in the same way.

One row is a caption, two encoded pictures or clips and how a judge liked them: ``label_0`` and
``label_1`` are 1 and 0, 0 and 1, or 0.5 each for a tie (Kirstain 2023, arXiv:2305.01569). Other
columns are kept out of the reader's way and cost nothing.
``rlalign.data.pairs.types`` says which types a column may have in a file that others wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlalign.core.files import replacing
from rlalign.core.registry import UserError, nearest, read_reason
from rlalign.data.pairs import listed
from rlalign.data.pairs.types import RULES, is_read, plain_batch

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED: tuple[str, ...] = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
"""Columns that a file of pairs must have. ``jpg_0`` and ``jpg_1`` hold the bytes of picture
files; clips are told by the content, animated WebP, PNG or GIF."""

OPTIONAL: tuple[str, ...] = (
    "are_different",
    "best_image_uid",
    "created_at",
    "has_label",
    "image_0_uid",
    "image_0_url",
    "image_1_uid",
    "image_1_url",
    "model_0",
    "model_1",
    "num_example_per_prompt",
    "ranking_id",
    "user_id",
)
"""The other columns of Pick-a-Pic v2, which ``write_pairs`` writes where the rows have them.
``has_label`` and ``are_different`` may rule a row out."""

RECORD = "record"
"""A caption's record as a JSON object, written where the rows have it."""

OF_CLIPS = ("frames", "rate")
"""Frames of each of the two clips, and how many of them a second, written where the rows have them.
A reader takes both from the files."""

Extra = Literal["bool", "double", "int64", "string"]
"""Arrow types that columns beyond Pick-a-Pic's may have."""

ROWS_PER_GROUP = 256
"""Rows of a row group as written: the unit in which a Parquet file is read."""


def pair_schema(
    columns: Sequence[str] = (*REQUIRED, *OPTIONAL), extras: Mapping[str, Extra] | None = None
) -> pa.Schema:
    """The Arrow types of the named columns of a pair; ``extras`` says those of further ones."""
    import pyarrow as pa

    kinds: dict[str, pa.DataType] = dict.fromkeys(("label_0", "label_1"), pa.float64())
    kinds |= dict.fromkeys(("jpg_0", "jpg_1"), pa.binary())
    kinds |= dict.fromkeys(("are_different", "has_label"), pa.bool_())
    numbers = ("num_example_per_prompt", "ranking_id", "user_id")
    kinds |= dict.fromkeys((*numbers, "frames"), pa.int64())
    kinds |= {"rate": pa.float64()}
    kinds |= {"created_at": pa.timestamp("ns")}
    kinds |= {name: pa.type_for_alias(kind) for name, kind in (extras or {}).items()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


def write_pairs(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    rows_per_group: int = ROWS_PER_GROUP,
    extras: Mapping[str, Extra] | None = None,
) -> int:
    """Writes pairs as one Parquet file, beside and then renamed, and returns how many.

    The first row decides which optional columns there are; columns beyond Pick-a-Pic's must be
    named in ``extras``, with their types, and be in every row. ``rows`` may be a generator, of
    which one row group is held at a time. Raises UserError when a row lacks a column, has an
    unknown one, or when there is no row at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # the first row decides on the columns
    groups = _groups(rows, rows_per_group)
    first = next(groups, None)
    if first is None:
        raise UserError(f"{path}: there is no pair to write")
    schema = pair_schema(_columns_of(first[0], extras or {}), extras)

    # one row group is in memory at a time
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replacing(path) as scratch, pq.ParquetWriter(scratch, schema, compression="zstd") as file:
        for group in chain([first], groups):
            for number, row in enumerate(group, start=count):
                if set(row) != set(schema.names):
                    raise UserError(
                        f"row {number} must have the columns {', '.join(schema.names)}, got"
                        f" {', '.join(row)}"
                    )
            file.write_table(pa.Table.from_pylist([dict(row) for row in group], schema=schema))
            count += len(group)
    return count


def _groups(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _columns_of(row: Mapping[str, Any], extras: Mapping[str, Extra]) -> tuple[str, ...]:
    missing = [name for name in (*REQUIRED, *extras) if name not in row]
    optional = (*OPTIONAL, *OF_CLIPS, RECORD)
    unknown = [name for name in row if name not in (*REQUIRED, *optional, *extras)]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        what += "" if missing else f"; {nearest(unknown[0], [*optional])}"
        raise UserError(f"a pair must have the columns {', '.join(REQUIRED)}; the first row {what}")
    return (*REQUIRED, *(name for name in optional if name in row), *extras)


def pair_files(path: str, place: str = "preferences.path") -> list[Path]:
    """The files of pairs that a user means: a file, a glob, or those of a folder; sorted by name.

    Of a folder all ``*.parquet`` below it; where there is none its ``train.json``, as HPD v2 has
    it; else all ``*.jsonl`` below it.
    """
    # a file, a folder or a pattern
    folder = Path(path)
    if not path:
        found = []
    elif folder.is_dir():
        found = _files_below(folder)
    elif folder.is_file():
        found = [folder]
    else:
        try:
            found = sorted(Path(folder.anchor).glob(str(folder.relative_to(folder.anchor))))
        except ValueError:  # "**x", no pattern
            found = []

    # hidden files are no data
    found = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise UserError(
            f"{place} must name a file of pairs (Parquet, JSON or JSONL), a folder of them or a"
            f" glob, got {path!r}, where there is none"
        )
    return found


def _files_below(folder: Path) -> list[Path]:
    for pattern in ("**/*.parquet", "train.json", "**/*.jsonl"):
        found = [file for file in folder.glob(pattern) if not file.name.startswith(".")]
        if found:
            return sorted(found)
    return []


def group_rows(file: Path) -> list[int]:
    """Rows of each row group, from the file's footer alone; a list in JSON is parsed for it. Raises
    UserError when it is not a file of pairs."""
    if listed.is_list(file):
        return listed.sizes_of(file)
    with _opened(file) as parquet:
        return [
            parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)
        ]


def open_pairs(
    file: Path,
    columns: Sequence[str] = REQUIRED,
    *,
    groups: Sequence[int] | None = None,
    batch: int = 64,
) -> Iterator[pa.RecordBatch]:
    """Record batches of up to ``batch`` rows, of all row groups or of the named ones, in file
    order.

    Only ``columns`` are read (those that the file lacks and that are optional are left out), never
    the whole file at once. Whatever their types are in the file, captions come as strings, labels
    as float64 and flags as bool; pictures come as bytes, or as a struct of ``bytes`` and ``path``.
    Raises UserError when the file is not Parquet, lacks a required column, or has one of a type
    that is not read.
    """
    import pyarrow as pa

    if listed.is_list(file):
        yield from listed.open_list(file, columns, groups=groups, batch=batch)
        return
    with _opened(file) as parquet:
        there = [name for name in columns if name in parquet.schema_arrow.names]
        chosen = None if groups is None else list(groups)
        try:
            for found in parquet.iter_batches(batch_size=batch, row_groups=chosen, columns=there):
                yield plain_batch(found)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{file} is damaged: {read_reason(error)}; write or download it again"
            ) from error


def _opened(file: Path) -> Any:
    """pyarrow's ParquetFile over a file of pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # what is no Parquet file is refused here
    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names  # a damaged one is no text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} must be a Parquet file of preference pairs ({read_reason(error)})"
        ) from error

    # a file whose columns are refused is closed
    try:
        _refuse_columns(file, parquet.schema_arrow, names)
    except UserError:
        parquet.close()
        raise
    return parquet


def _refuse_columns(file: Path, schema: pa.Schema, names: list[str]) -> None:
    """Raises UserError where a column that is read is missing, there twice, or of a type that is
    not read."""
    missing = next((name for name in REQUIRED if name not in names), None)
    if missing is not None:
        raise UserError(
            f"{file} must have the columns {', '.join(REQUIRED)}, and lacks {missing!r};"
            f" {nearest(missing, names)}"
        )
    for name, rule in RULES.items():
        if names.count(name) > 1:
            raise UserError(f"{file} has the column {name!r} {names.count(name)} times; keep one")
        if name in names and not is_read(name, schema.field(name).type):
            raise UserError(
                f"{file}: column {name!r} must hold {rule}, got the type {schema.field(name).type}"
            )
