"""Standard input, output and error as a command finds them: closed, of another encoding than UTF-8,
or without a reader.

A sign that an encoding does not have is written in ASCII (``+-`` for a plus-minus sign, ``\\u2026``
for what has no stand-in). A command that works, as training does, goes on where nobody can be told
any more; one that only tells something ends.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

ERRORS = "rlalign.ascii"
"""The name of ``spell_in_ascii`` among Python's handlers of encoding errors."""
_ASCII = str.maketrans({"±": "+-", "−": "-", "–": "-", "×": "x", "→": "->", "…": "..."})


def spell_in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Signs that a stream's encoding does not have, in ASCII; and where to go on."""
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end].translate(_ASCII)
    return signs.encode("ascii", "backslashreplace").decode("ascii"), error.end


def use_utf8() -> None:
    """Begins this process again in Python's UTF-8 mode, where the locale has file names of another
    encoding.

    A run file is UTF-8, and so are the paths in it; Ray's workers inherit the mode. The terminal
    keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8" or "utf8" in sys._xoptions:
        return
    os.environ.setdefault(
        "PYTHONIOENCODING", sys.stdout.encoding if sys.stdout is not None else "utf-8"
    )
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def prepare() -> None:
    """Opens the standard streams that are closed on the null device, and lets no sign of a text be
    an error."""
    codecs.register_error(ERRORS, spell_in_ascii)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the next file to be opened would get the number, and what a library prints
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, "the lowest number that is free"
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


@contextlib.contextmanager
def go_on_unread() -> Iterator[None]:
    """Inside, writing to standard output and error never fails: what cannot be written is left
    out."""
    streams = _Unfailing(sys.stdout), _Unfailing(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.finish()


class _Unfailing:
    """A stream whose reader may go, or whose disk may be full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def finish(self) -> None:
        """Writes what is held back, to nobody where it must be: Python itself would fail on it at
        its end."""
        try:
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
