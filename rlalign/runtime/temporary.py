"""The folder in which a local Ray keeps its sockets, logs and spilled objects."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from rlalign.core.registry import UserError

MAX_SOCKET_BYTES = 107
"""Of a Unix socket's path; the system's own limit."""
LONGEST_SOCKET = "dash_MetricsHead"
"""Of the sockets in the folder of a session of Ray 2.60."""
PYTHONS_SOCKET = "pymp-12345678/listener-12345678"
"""In TMPDIR, of Python's own helper that starts processes: the dashboard's."""
COMMON = ("/tmp", "/var/tmp")
"""Where everybody may make a folder; the first one serves where no variable names another."""
MIN_FREE_BYTES = 2**24
"""The logs of a start alone take 2 MB."""


def temporary_folder(say: Callable[[str], None]) -> Path:
    """Where Ray's folder goes: RAY_TMPDIR, else TMPDIR, else /tmp, and where the last two do not
    serve, one of the user's own.

    A batch system gives each job a TMPDIR of any length, so that one is only a wish: what is wrong
    with it, and which folder is used instead, is handed to ``say``. Raises UserError, naming
    RAY_TMPDIR, for a RAY_TMPDIR that does not serve, or where nothing else does.
    """
    # a folder that the user names is taken or refused
    if wanted := os.environ.get("RAY_TMPDIR"):
        folder = Path(wanted).expanduser().absolute()
        if fault := _fault(folder):
            raise UserError(
                f"RAY_TMPDIR must be a folder that Ray can use, got {wanted!r}, which {fault}; name"
                " another"
            )
        return folder

    # otherwise the usual folder, where Ray can use it
    name = "TMPDIR" if os.environ.get("TMPDIR") else "the folder for temporary files"
    usual = Path(os.environ.get("TMPDIR") or COMMON[0]).absolute()
    fault = _fault(usual)
    if not fault:
        return usual

    # otherwise a private one with a short path
    for base in COMMON:
        own = Path(base) / f"rlalign-{os.getuid()}"
        if not _fault(own, private=True):
            say(
                f"{name} {str(usual)!r} {fault}; Ray's files are in {own} instead (RAY_TMPDIR names"
                " another folder)"
            )
            return own
    raise UserError(
        f"{name} {str(usual)!r} {fault}, and neither {' nor '.join(COMMON)} has room for Ray's"
        " files; name a short folder that can be written in RAY_TMPDIR"
    )


@contextlib.contextmanager
def short_tmpdir(folder: Path) -> Iterator[None]:
    """Inside, TMPDIR is ``folder`` for the processes that are started, where it is too long for
    their own sockets."""
    usual = os.environ.get("TMPDIR", "")
    if _excess(Path(usual) / PYTHONS_SOCKET) <= 0:
        yield
        return
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        os.environ["TMPDIR"] = usual


def _fault(folder: Path, *, private: bool = False) -> str:
    """Why Ray cannot keep its files in a folder; "" where it can. Makes the folder where there is
    none.

    ``private``: it must be the user's own, as others may have made one of its name before.
    """
    # the kernel limits the length of a socket's path
    if (excess := _excess(_longest_socket(folder))) > 0:
        return f"is {excess} bytes too long for the Unix sockets that Ray puts into it"
    try:
        if private:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if (
                not stat.S_ISDIR(found.st_mode)
                or found.st_uid != os.getuid()
                or found.st_mode & 0o022
            ):
                return "is not this user's own"

        # a file is written, since permissions alone do not say that this works
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder / "ray") as scratch:
            (Path(scratch) / "written").write_bytes(bytes(4096))
        free = shutil.disk_usage(folder / "ray").free
    except OSError as error:
        return f"cannot be written ({os.strerror(error.errno or errno.EIO)})"
    return (
        f"has {free / 2**20:.0f} MB of free space, of which Ray needs 16"
        if free < MIN_FREE_BYTES
        else ""
    )


def _excess(socket: Path) -> int:
    """Bytes by which the path of a socket is too long."""
    return len(os.fsencode(socket)) - MAX_SOCKET_BYTES


def _longest_socket(folder: Path) -> Path:
    """The longest path of a socket of a session that this process would start now."""
    session = f"session_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S_%f')}_{os.getpid()}"
    return folder / "ray" / session / "sockets" / LONGEST_SOCKET
