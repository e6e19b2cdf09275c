"""Files of one prompt on a line, or in one row of CSV: where each begins and ends is in memory, 16
bytes a prompt, and a prompt is read when it is asked for."""

from __future__ import annotations

import csv
import io
import os
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.core.files import MARK, UnreadableText, read_text, split_lines
from rlalign.core.registry import UserError, read_reason
from rlalign.data.prompts._rows import Columns, to_prompt
from rlalign.data.prompts._table import BATCH, PromptTable

_PIECE = 2**22
"""Bytes of a file that are looked at together."""
LARGE = 2**22
"""Bytes of JSON lines from which on Arrow reads the column of prompts."""


class _Lines(PromptTable):
    """A file with a prompt in each of its parts. ``spans_N2`` is (N, 2) int64: where each part
    begins and ends, in bytes."""

    def __init__(self, file: Path, spans_N2: np.ndarray) -> None:
        self.file = file
        self.spans_N2 = spans_N2
        self._opened = file.open("rb")

    def __len__(self) -> int:
        return len(self.spans_N2)

    @abstractmethod
    def _parse(self, part: bytes, begin: int) -> str:
        """The prompt of a part, which begins at a byte of the file."""

    def _text(self, part: bytes, begin: int) -> str:
        """Its text alone; "" where it has none."""
        return self._parse(part, begin)

    def take(self, numbers: Sequence[int]) -> list[str]:
        found = []
        for begin, end in self.spans_N2[list(numbers)].tolist():
            # at a place of its own: processes and threads share the open file
            found.append(self._parse(os.pread(self._opened.fileno(), end - begin, begin), begin))
        return found

    def batches(self) -> Iterator[list[str]]:
        for batch in self._parts():
            yield [self._parse(part, begin) for part, begin in batch]

    def texts(self) -> Iterator[list[str]]:
        for batch in self._parts():
            yield [self._text(part, begin) for part, begin in batch]

    def _parts(self) -> Iterator[Iterator[tuple[bytes, int]]]:
        """(a part, where it begins) of every prompt, a batch at a time."""
        for block, at, spans_N2 in self._blocks():
            yield ((block[b - at : e - at], b) for b, e in spans_N2.tolist())

    def _blocks(self) -> Iterator[tuple[bytes, int, np.ndarray]]:
        """(bytes of the file, where they begin, the spans in them) of every batch."""
        for first in range(0, len(self), BATCH):
            spans_N2 = self.spans_N2[first : first + BATCH]
            at = int(spans_N2[0, 0])
            yield os.pread(self._opened.fileno(), int(spans_N2[-1, 1]) - at, at), at, spans_N2


class TextLines(_Lines):
    """A UTF-8 text with a prompt on each line; empty lines are left out.

    Raises UnreadableText for what is no UTF-8 text.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, line_spans(file))

    def _parse(self, part: bytes, begin: int) -> str:
        return part.decode("utf-8").removeprefix(MARK).strip()

    def texts(self) -> Iterator[list[str]]:
        for block, _, _ in self._blocks():
            lines = split_lines(block.decode("utf-8"))
            yield [text for line in lines if (text := line.strip())]


class JsonLines(_Lines):
    """JSON lines: an object of a prompt and its record on each, or a string, which is a prompt.

    Raises UserError with the line for one that is neither, or that lacks the column of prompts;
    ``place`` is the setting that names the file.
    """

    def __init__(self, file: Path, columns: Columns, place: str) -> None:
        super().__init__(file, line_spans(file))
        self.place = place
        self.columns = columns
        if len(self):
            [first] = self._values([0])
            if isinstance(first, dict):
                self.columns = columns.of(first, repr(str(file)), _column_setting(place))
        self._is_large = file.stat().st_size >= LARGE and hasattr(_arrow_json(), "open_json")
        kept = self._kept_by_arrow() if self._is_large else None
        if kept is None:
            self._is_large = False
            kept = np.array([bool(text) for batch in self.texts() for text in batch], bool)
        self.spans_N2 = self.spans_N2[kept]

    def texts(self) -> Iterator[list[str]]:
        if not self._is_large:
            yield from super().texts()
            return
        for texts in self._texts_by_arrow():
            yield [text for one in texts if one and (text := one.strip())]

    def _texts_by_arrow(self) -> Iterator[list[str | None]]:
        """The column of prompts of every line, read by Arrow: several times as fast. Raises
        ValueError for what it does not read."""
        import pyarrow as pa

        json = _arrow_json()
        found = json.open_json(
            self.file,
            parse_options=json.ParseOptions(
                explicit_schema=pa.schema([(self.columns.prompt, pa.string())]),
                unexpected_field_behavior="ignore",
            ),
        )
        for batch in found:
            yield batch.column(0).to_pylist()

    def _kept_by_arrow(self) -> np.ndarray | None:
        """(N,) bool: the lines that have a prompt; None where Arrow does not read the file, such as
        one with a mistake, which is then found line by line."""
        kept = array("b")
        missing: list[int] = []
        try:
            for texts in self._texts_by_arrow():
                missing += [len(kept) + i for i, text in enumerate(texts) if text is None]
                kept.extend(bool(text and text.strip()) for text in texts)
        except ValueError:
            return None
        # null, or not there
        for number in missing if len(kept) == len(self) else ():
            begin, end = self.spans_N2[number].tolist()
            self._text(os.pread(self._opened.fileno(), end - begin, begin), begin)
        return np.array(kept, bool) if len(kept) == len(self) else None

    def _values(self, numbers: Sequence[int]) -> list[Any]:
        spans = self.spans_N2[list(numbers)].tolist()
        return [self._value(os.pread(self._opened.fileno(), e - b, b), b) for b, e in spans]

    def _parse(self, part: bytes, begin: int) -> str:
        value = self._value(part, begin)
        return to_prompt(value, self.columns) if isinstance(value, dict) else value.strip()

    def _text(self, part: bytes, begin: int) -> str:
        value = self._value(part, begin)
        if isinstance(value, dict):
            if self.columns.prompt not in value:
                raise self._refused(begin, f"has no {self.columns.prompt!r}")
            value = value[self.columns.prompt]
            if value is None:
                return ""
            if not isinstance(value, str):
                raise self._refused(begin, f"has a {type(value).__name__} as its prompt")
        return value.strip()

    def _value(self, part: bytes, begin: int) -> Any:
        """The object or string of a line."""
        from pydantic_core import from_json

        try:
            found = from_json(part.removeprefix(MARK.encode()))
        except ValueError as error:
            raise self._refused(begin, f"is no JSON ({read_reason(error)})") from error
        if not isinstance(found, dict | str):
            raise self._refused(begin, f"is a {type(found).__name__}")
        return found

    def _refused(self, begin: int, why: str) -> UserError:
        line = _line_at(self.file, begin)
        return UserError(
            f"{self.place} must hold a JSON object with a prompt on each line, got"
            f" {str(self.file)!r}, whose line {line} {why}"
        )


class CsvRows(_Lines):
    """CSV or TSV whose first row names the columns; a field may hold line breaks, in quotes.

    Every value is text, and an empty one is none. Raises UserError for rows of another length than
    the first, and for what is no CSV.
    """

    def __init__(self, file: Path, separator: str, columns: Columns, place: str) -> None:
        self.separator = separator
        self.place = place
        self.names: list[str] = []
        self.columns = columns
        super().__init__(file, self._index(file))

    def _parse(self, part: bytes, begin: int) -> str:
        return to_prompt({n: v for n, v in self._row(part).items() if v.strip()}, self.columns)

    def _text(self, part: bytes, begin: int) -> str:
        return self._row(part)[self.columns.prompt].strip()

    def _row(self, part: bytes) -> dict[str, str]:
        text = io.StringIO(part.decode("utf-8"), newline="")
        values = next(csv.reader(text, delimiter=self.separator))
        return dict(zip(self.names, values, strict=True))

    def _index(self, file: Path) -> np.ndarray:
        """Reads the names of the columns; (N, 2) where the rows below them are that have a
        prompt."""
        at = 0

        def lines(opened: io.BufferedReader) -> Iterator[str]:
            nonlocal at
            for line in opened:
                start = at
                at += len(line)
                yield line.decode("utf-8-sig" if start == 0 else "utf-8")

        spans = array("q")
        with file.open("rb") as opened:
            rows = csv.reader(lines(opened), delimiter=self.separator)
            try:
                self._read_names(next(rows, []), file)
                column = self.names.index(self.columns.prompt)
                begin = at
                for row in rows:
                    if row and len(row) != len(self.names):
                        raise csv.Error(f"it has {len(row)} cells and the first {len(self.names)}")
                    spans.extend([begin, at] if row and row[column].strip() else [])
                    begin = at
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(
                    f"{self.place} must be a table with a first row of names, got {str(file)!r},"
                    f" whose row at line {max(rows.line_num, 1)} is none ({read_reason(error)})"
                ) from error
        return np.array(spans, dtype=np.int64).reshape(-1, 2)

    def _read_names(self, row: Sequence[str], file: Path) -> None:
        self.names = [name.strip() for name in row]
        self.columns = self.columns.of(self.names, repr(str(file)), _column_setting(self.place))


def _arrow_json() -> Any:
    import pyarrow.json

    return pyarrow.json


def line_spans(file: Path) -> np.ndarray:
    r"""(N, 2) int64: where the lines of a UTF-8 text begin and end that hold more than space.

    \n, \r\n and \r end a line. Raises UnreadableText for what is no text.
    """
    found: list[np.ndarray] = []
    at = 0
    rest = b""
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            # whole lines alone
            piece = rest + piece
            cut = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
            rest = piece[cut:]
            found.append(_spans_in(file, piece[:cut], at))
            at += cut
    found.append(_spans_in(file, rest, at))
    return np.concatenate(found)


def _spans_in(file: Path, piece: bytes, at: int) -> np.ndarray:
    """The same of whole lines that begin at a byte of the file."""
    try:
        piece.decode("utf-8")
        is_text = b"\0" not in piece
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        read_text(file)
        raise UnreadableText("it changes while it is read")

    # between two breaks is a line; that of \r\n has nothing in it
    mark = len(MARK.encode()) if at == 0 and piece.startswith(MARK.encode()) else 0
    codes = np.frombuffer(piece, np.uint8)
    breaks = np.flatnonzero((codes == 10) | (codes == 13))
    spans_N2 = np.stack(
        [np.concatenate([[mark], breaks + 1]), np.concatenate([breaks, [len(piece)]])], axis=1
    )
    spans_N2 = spans_N2[spans_N2[:, 1] > spans_N2[:, 0]]

    # what begins with a space, or outside ASCII, may be nothing but space
    first = codes[spans_N2[:, 0]]
    kept = np.ones(len(spans_N2), bool)
    for row in np.flatnonzero((first <= 32) | (first >= 128)).tolist():
        begin, end = spans_N2[row].tolist()
        kept[row] = bool(piece[begin:end].decode("utf-8").removeprefix(MARK).strip())
    return spans_N2[kept] + at


def _column_setting(place: str) -> str:
    """Where the column of a file's prompts is named: beside the setting that names the file."""
    return f"{place.rpartition('.')[0]}.column".lstrip(".")


def _line_at(file: Path, begin: int) -> int:
    """The number of the line that begins at a byte, from 1."""
    with file.open("rb") as opened:
        before = opened.read(begin)
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")
