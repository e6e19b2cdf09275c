"""Files: text that a user gives (UTF-8, with or without a byte-order mark), and what is written
whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte-order mark -> the encoding that it announces; UTF-32's first, which begins with UTF-16's."""

MARK = "\ufeff"
"""A byte-order mark once it is decoded."""


class UnreadableText(ValueError):
    """A file that is not read as text, with the reason in a few words. Whoever caught it knows
    which."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark.

    Raises UnreadableText for another encoding or a file of bytes, and OSError where it cannot be
    read at all.
    """
    content = path.read_bytes()
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise UnreadableText(f"it is {encoding}; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableText(
            f"byte {error.start} is not (line {line}); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UnreadableText(
            f"line {line} holds a NUL, as UTF-16 and files of bytes do; save it as UTF-8 text"
        )
    return text


def split_lines(text: str) -> list[str]:
    r"""The lines of a text as Python's text files give them.

    \n, \r\n and \r end a line, and no other character does. A byte-order mark at the start of
    a line,
    as files put one after another have it, is left out.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.removeprefix(MARK) for line in lines]


def join_surrogates(text: str) -> str:
    r"""The text that JSON's escapes mean: a pair such as \ud83d\ude00 is one character.

    Raises UnreadableText for half a pair, which no text can hold.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        half = next(c for c in text if "\ud800" <= c <= "\udfff")
        raise UnreadableText(
            f"\\u{ord(half):04x} is half of a surrogate pair, which no text can hold"
        ) from error


def parse_strict_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, for NaN and Infinity, and for a
    key that appears twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _refuse_constant(constant: str) -> Any:
    raise ValueError(constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes the place of ``path`` when the body ends.

    After an error, or in a process that is killed, ``path`` is what it was before.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        if scratch.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(scratch, path)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file whole or not at all; text is UTF-8."""
    with replacing(path) as scratch:
        write_durably(scratch, content.encode() if isinstance(content, str) else content)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is on the disk when this returns."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump_json(content: Any, indent: int | None = None) -> str:
    """JSON in which NaN and infinities, which it does not know, are null."""
    return json.dumps(_replace_non_finite(content), indent=indent)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _replace_non_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
