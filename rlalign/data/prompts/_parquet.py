"""Parquet files of prompts: read by row groups in small batches, and of them the columns that are
wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.core.registry import UserError, read_reason
from rlalign.data.prompts._rows import Columns, to_prompt
from rlalign.data.prompts._table import BATCH, PromptTable

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetRows(PromptTable):
    """The rows of a Parquet file that have a prompt; 8 bytes a row are in memory.

    Other columns make the record where JSON can say what they hold: text, numbers, true and false,
    and lists and structs of them. A null is a field that is not there. Others, such as pictures,
    are not read. Raises UserError for a damaged file, and for one without a column of prompts.
    """

    def __init__(self, file: Path, columns: Columns, place: str) -> None:
        self.file = file
        self.place = place
        with self._opened() as parquet:
            schema = parquet.schema_arrow
            self._metadata = parquet.metadata
        setting = f"{place.rpartition('.')[0]}.column".lstrip(".")
        self.columns = columns.of(schema.names, repr(str(file)), setting)
        self._check_types(schema, setting)
        groups = [self._metadata.row_group(i).num_rows for i in range(len(self._groups))]
        self._bounds = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._rows = self._with_prompt()

    def _check_types(self, schema: pa.Schema, setting: str) -> None:
        """Chooses the columns that are read."""
        kinds = {field.name: field.type for field in schema}
        # a shard may have no prompt at all
        if not (_is_text(kinds[self.columns.prompt]) or _is_null(kinds[self.columns.prompt])):
            raise UserError(
                f"{setting} must name a column of text, got {self.columns.prompt!r} of"
                f" {str(self.file)!r}, which is of {kinds[self.columns.prompt]}"
            )
        wanted = [name for name in schema.names if self.columns.takes(name)]
        beyond = [name for name in wanted if not _is_json(kinds[name])]
        if beyond and self.columns.record is not None:
            raise UserError(
                f"{setting.rpartition('.')[0]}.record must name columns of text, numbers, lists and"
                f" structs, got {beyond[0]!r}, which is of {kinds[beyond[0]]}"
            )
        self._read = [self.columns.prompt, *(name for name in wanted if name not in beyond)]

    @property
    def _groups(self) -> range:
        return range(self._metadata.num_row_groups)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Sequence[int]) -> list[str]:
        rows = self._rows[list(numbers)]
        found: dict[int, str] = {}

        # one pass over each row group that has some of them
        wanted = np.unique(rows)
        for group in np.unique(np.searchsorted(self._bounds, wanted, "right") - 1).tolist():
            begin, end = self._bounds[group : group + 2]
            last = wanted[wanted < end][-1]
            for batch in self._batches(self._read, [group]):
                inside = wanted[(wanted >= begin) & (wanted < begin + batch.num_rows)]
                found |= zip(inside.tolist(), self._prompts(batch, inside - begin), strict=True)
                begin += batch.num_rows
                if begin > last:
                    break
        return [found[row] for row in rows.tolist()]

    def batches(self) -> Iterator[list[str]]:
        for batch, inside in self._walk(self._read):
            yield self._prompts(batch, inside)

    def texts(self) -> Iterator[list[str]]:
        for batch, inside in self._walk([self.columns.prompt]):
            yield [text.strip() for text in batch.column(0).take(inside).to_pylist()]

    def _walk(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        """(a batch, its rows that have a prompt) of the whole file."""
        begin = 0
        for batch in self._batches(columns, self._groups):
            first, last = np.searchsorted(self._rows, [begin, begin + batch.num_rows])
            yield batch, self._rows[first:last] - begin
            begin += batch.num_rows

    def _prompts(self, batch: pa.RecordBatch, rows: np.ndarray) -> list[str]:
        return [
            to_prompt(_without_nulls(row), self.columns) for row in batch.take(rows).to_pylist()
        ]

    def _with_prompt(self) -> np.ndarray:
        """(N,) int64: the rows that have a prompt, ascending."""
        found = [np.empty(0, np.int64)]
        begin = 0
        for batch in self._batches([self.columns.prompt], self._groups):
            has_text = [bool(text and text.strip()) for text in batch.column(0).to_pylist()]
            found.append(np.flatnonzero(has_text) + begin)
            begin += batch.num_rows
        return np.concatenate(found)

    def _batches(self, columns: Sequence[str], groups: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """The named columns of some row groups, the first of them as strings."""
        import pyarrow as pa

        with self._opened() as parquet:
            begin = int(self._bounds[min(groups, default=0)])
            try:
                for batch in parquet.iter_batches(
                    batch_size=BATCH, row_groups=list(groups), columns=columns, use_threads=False
                ):
                    first = _text(batch.column(columns[0]))
                    begin += (valid := _count_valid(first))
                    if valid < len(first):
                        raise pa.ArrowInvalid("invalid UTF-8")
                    others = [batch.column(name) for name in columns[1:]]
                    yield pa.RecordBatch.from_arrays([first, *others], names=list(columns))
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"{self.place}: {str(self.file)!r} is damaged, or its text is not UTF-8, from"
                    f" row {begin + 1} on ({read_reason(error)}); write or download it again"
                ) from error

    def _opened(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(
                self.file, metadata=getattr(self, "_metadata", None), pre_buffer=False
            )
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.place} must be a readable Parquet file, got {str(self.file)!r}"
                f" ({read_reason(error)})"
            ) from error


def _text(column: Any) -> Any:
    """A column of text as strings."""
    import pyarrow as pa

    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    return column if column.type == pa.string() else column.cast(pa.string())


def _count_valid(column: Any) -> int:
    """How many strings of a column come before the first that is not UTF-8; all, where none is."""
    import pyarrow as pa

    try:
        column.validate(full=True)
        return len(column)
    except pa.ArrowInvalid:
        # of one string none, of more those of the first half and, where it is whole, the other's
        half = len(column) // 2
        valid = _count_valid(column.slice(0, half)) if half else 0
        return valid + _count_valid(column.slice(half)) if half and valid == half else valid


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_null(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_null(kind)


def _is_json(kind: pa.DataType) -> bool:
    """Whether JSON has values for those of an Arrow type."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    numbers = types.is_integer(kind) or types.is_floating(kind)
    return numbers or types.is_boolean(kind) or _is_null(kind) or _is_text(kind)


def _without_nulls(value: Any) -> Any:
    """Structs without the fields that are null or NaN."""
    if isinstance(value, dict):
        plain = {name: _without_nulls(one) for name, one in value.items()}
        return {name: one for name, one in plain.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
