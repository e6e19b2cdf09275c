"""Which process owns a run folder on an object store: a small object that its owner renews.

A file's lock does not reach there, and pyarrow's file systems have no conditional put. So the
promise is this: a process that starts while another one renews the lease is refused; of two that
start within a second of each other one is refused; and an owner that was silent for
``LEASE_SECONDS`` and finds another's lease when it comes back stops before it publishes anything
more. Whatever two owners may have published meanwhile is of the same run, and so the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from rlalign.core.registry import UserError
from rlalign.storage.store import Store

NAME = ".owner.json"
LEASE_SECONDS = 60.0
"""An owner that has not renewed its lease for so long is gone."""
RENEW_SECONDS = 10.0
SETTLE_SECONDS = 1.0
"""After a lease was written, until it is read again: another process may have written too."""
LOOK_SECONDS = 0.5


def acquire(store: Store, tell: Callable[[str], None]) -> str:
    """The name of a new owner, under a lease that is written. Waits until one that is not renewed
    has run out, or its process on this machine is gone. Raises UserError where it is renewed."""
    owner = uuid.uuid4().hex
    seen = _read(store)
    began = time.monotonic()
    told = False
    while seen is not None and not _is_gone(seen):
        if time.monotonic() - began > LEASE_SECONDS:
            break
        if not told and time.monotonic() - began > 2 * LOOK_SECONDS:
            tell(
                f"{store.name} is {_name(seen)}'s; waiting up to {LEASE_SECONDS:.0f} s to see"
                " whether that one is still there"
            )
            told = True
        time.sleep(LOOK_SECONDS)
        found = _read(store)
        if found is not None and found != seen:
            raise _taken(store, found)
        seen = found

    # another one may have done the same at the same time
    renew(store, owner)
    time.sleep(SETTLE_SECONDS)
    found = _read(store)
    if found is not None and found.get("owner") != owner:
        raise _taken(store, found)
    return owner


def renew(store: Store, owner: str) -> None:
    """Writes the lease anew."""
    said = {
        "owner": owner,
        "host": socket.gethostname(),
        "machine": machine(),
        "process": os.getpid(),
        "renewed": time.time(),
    }
    store.put(NAME, json.dumps(said).encode())


def other_owner(store: Store, owner: str) -> str:
    """Who has the lease where it is not ``owner``: "process 12 on HOST"; "" where it is, or where
    nobody has."""
    found = _read(store)
    return _name(found) if found is not None and found.get("owner") != owner else ""


def release(store: Store, owner: str) -> None:
    """Removes the lease where it is still the owner's."""
    if not other_owner(store, owner):
        store.delete(NAME)


def _taken(store: Store, found: dict[str, Any]) -> UserError:
    return UserError(f"{store.name} is being written by {_name(found)}; stop that one first")


def _read(store: Store) -> dict[str, Any] | None:
    """The lease; None where there is none that can be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(store.read(NAME))
        return found if isinstance(found, dict) else None
    return None


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether the owner's process was of this machine and has ended."""
    process = found.get("process")
    if found.get("machine") != machine() or not isinstance(process, int):
        return False
    return not psutil.pid_exists(process)


def _name(found: dict[str, Any]) -> str:
    return f"process {found.get('process')} on {found.get('host')}"


def machine() -> str:
    """This machine since it was started, and the processes that are seen in it: host names repeat
    among containers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
