"""Parquet files of preference pairs, in the columns of Pick-a-Pic v2: written whole or not at all, read in row batches.

One row is a caption, two encoded pictures and how a judge liked them: ``label_0`` and ``label_1`` are 1 and 0, 0 and 1, or
0.5 each for a tie (Kirstain 2023, arXiv:2305.01569). Other columns are kept out of the reader's way and cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.registry import UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

REQUIRED: tuple[str, ...] = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
"""Columns that a file of pairs must have. ``jpg_0`` and ``jpg_1`` hold the bytes of JPEG or PNG files."""

OPTIONAL: tuple[str, ...] = (
    "are_different", "best_image_uid", "has_label", "image_0_uid", "image_1_uid", "model_0", "model_1", "ranking_id"
)  # fmt: skip
"""Columns that ``write_pairs`` writes where the rows have them. ``has_label`` and ``are_different`` may rule a row out."""

ROWS_PER_GROUP = 256
"""Rows of a row group as written: the unit in which a Parquet file is read."""


def pair_schema(columns: Sequence[str] = (*REQUIRED, *OPTIONAL)) -> pa.Schema:
    """The Arrow types of the named columns of a pair."""
    import pyarrow as pa

    kinds = dict.fromkeys(("label_0", "label_1"), pa.float64())
    kinds |= dict.fromkeys(("jpg_0", "jpg_1"), pa.binary())
    kinds |= dict.fromkeys(("are_different", "has_label"), pa.bool_())
    kinds |= {"ranking_id": pa.int64()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


def write_pairs(path: Path, rows: Iterable[Mapping[str, Any]], *, rows_per_group: int = ROWS_PER_GROUP) -> int:
    """Writes pairs as one Parquet file, beside and then renamed, and returns how many.

    The first row decides which optional columns there are; ``rows`` may be a generator, of which one row group is held at a
    time. Raises UserError when a row lacks a column, has an unknown one, or when there is no row at all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    writer: pq.ParquetWriter | None = None
    names: tuple[str, ...] = ()
    count = 0
    try:
        for group in _groups(rows, rows_per_group):
            if writer is None:
                names = _columns_of(group[0])
                writer = pq.ParquetWriter(scratch, pair_schema(names), compression="zstd")
            for number, row in enumerate(group, start=count):
                if set(row) != set(names):
                    raise UserError(f"row {number} must have the columns {', '.join(names)}, got {', '.join(row)}")
            writer.write_table(pa.Table.from_pylist([dict(row) for row in group], schema=writer.schema))
            count += len(group)
        if writer is None:
            raise UserError(f"{path}: there is no pair to write")
        writer.close()
        os.replace(scratch, path)
    finally:
        if writer is not None:
            writer.close()
        scratch.unlink(missing_ok=True)
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


def _columns_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    missing = [name for name in REQUIRED if name not in row]
    unknown = [name for name in row if name not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}; {nearest(unknown[0], [*OPTIONAL])}"
        raise UserError(f"a pair must have the columns {', '.join(REQUIRED)}; the first row {what}")
    return (*REQUIRED, *(name for name in OPTIONAL if name in row))


def pair_files(path: str, place: str = "preferences.path") -> list[Path]:
    """The Parquet files that a user means: a file, all ``*.parquet`` below a folder, or a glob; sorted by name."""
    folder = Path(path)
    if not path:
        found = []
    elif folder.is_dir():
        found = sorted(folder.rglob("*.parquet"))
    elif folder.is_file():
        found = [folder]
    else:
        try:
            found = sorted(Path(folder.anchor).glob(str(folder.relative_to(folder.anchor))))
        except ValueError:  # "**x", no pattern
            found = []
    found = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not found:
        raise UserError(
            f"{place} must name a Parquet file, a folder of them or a glob, got {path!r}, where there is none"
        )
    return found


def group_rows(file: Path) -> list[int]:
    """Rows of each row group, from the file's footer alone. Raises UserError when it is not a file of pairs."""
    with _opened(file) as parquet:
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]


def open_pairs(
    file: Path, columns: Sequence[str] = REQUIRED, *, groups: Sequence[int] | None = None, batch: int = 64
) -> Iterator[pa.RecordBatch]:
    """Record batches of up to ``batch`` rows, of all row groups or of the named ones, in file order.

    Only ``columns`` are read (those that the file lacks and that are optional are left out), never the whole file at once.
    Raises UserError when the file is not Parquet or lacks a required column.
    """
    import pyarrow as pa

    with _opened(file) as parquet:
        there = [name for name in columns if name in parquet.schema_arrow.names]
        chosen = None if groups is None else list(groups)
        try:
            yield from parquet.iter_batches(batch_size=batch, row_groups=chosen, columns=there)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{file} is damaged: {_first_line(error)}; write or download it again") from error


def _opened(file: Path) -> Any:
    """pyarrow's ParquetFile over a file of pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} must be a Parquet file of preference pairs ({_first_line(error)})") from error
    names = parquet.schema_arrow.names
    missing = next((name for name in REQUIRED if name not in names), None)
    if missing is not None:
        parquet.close()
        raise UserError(
            f"{file} must have the columns {', '.join(REQUIRED)}, and lacks {missing!r}; {nearest(missing, names)}"
        )
    return parquet


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
