"""A PostgreSQL of the tests' own: a server of this machine's binaries in a temporary folder, that
listens on a socket there and nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def binaries() -> Path | None:
    """The folder with initdb and postgres; None where there is none. Debian keeps them out of
    PATH."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    return versions[-1].parent if versions else None


def _version(initdb: Path) -> int:
    name = initdb.parents[1].name
    return int(name) if name.isdigit() else 0


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """Starts a server in the empty ``folder``, and gives the URL of its database ``postgres``.

    The socket's folder is named in the URL; paths of sockets are short, so keep ``folder`` short.
    """
    found = binaries()
    assert found is not None, "needs PostgreSQL's binaries (Debian: apt-get install postgresql)"
    who = _user(folder)
    data = folder / "data"
    subprocess.run(
        [found / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True,
        stdout=subprocess.DEVNULL,
        **who,
    )
    control = [found / "pg_ctl", "-D", data, "-w", "-t", "600"]
    settings = " ".join(["-c listen_addresses=''", f"-k {folder}", *options])
    log = ["-l", folder / "log"]
    subprocess.run([*control, *log, "-o", settings, "start"], check=True, **_quiet(), **who)
    try:
        yield f"postgresql://tests@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, **_quiet(), **who)


def _quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _user(folder: Path) -> dict[str, Any]:
    """Whom the server runs as: PostgreSQL refuses root, so root hands it to Debian's user."""
    if os.geteuid() != 0:
        return {}
    shutil.chown(folder, "postgres", "postgres")
    return {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}


@contextmanager
def temporary_server(*options: str) -> Iterator[str]:
    """A server whose folder is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder, server(Path(folder), *options) as url:
        yield url
