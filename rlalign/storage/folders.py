"""The folders that processes work in on behalf of a URL: made, swept away, and known by what a user
calls them.

They lie in a folder of the user's under TMPDIR, one for each time that a URL is opened. Each goes
when its work is done and published; one with something that the store has not taken is kept.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from rlalign.core.registry import UserError
from rlalign.storage import lease, session
from rlalign.storage.mirror import Choice, Mirror, choose_facts, choose_model, choose_work
from rlalign.storage.session import CONTROL, KEPT, Session
from rlalign.storage.store import Place, Store, StoreError, find_place

OPEN_SECONDS = 30.0
"""A store that does not answer for so long when a command begins is told of."""
CLOSE_SECONDS = 30.0
"""A run that has failed or was stopped waits so long for the store to take the rest."""
_LASTING = ("NO_SUCH_BUCKET", "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
_LASTING += ("INVALID_CLIENT_TOKEN_ID", "MISSING_AUTHENTICATION_TOKEN", "HTTP status 400")
"""Parts of answers that the next attempt gets too."""

Tell = Callable[[str], None]
Answer = TypeVar("Answer")

_opened: dict[Path, tuple[Store, Mirror, Choice, Session | None]] = {}
"""Working folder -> what it is a copy of, by which choice, and who publishes it."""


def _to_stderr(note: str) -> None:
    print(note, file=sys.stderr, flush=True)


@contextlib.contextmanager
def own_run(place: Place, *, learns: bool, tell: Tell = _to_stderr) -> Iterator[Path]:
    """The folder of the process that drives a run, which no other process drives meanwhile.

    ``learns``: it writes checkpoints too; else learners do, by ``join_run``. What is written is
    published while the body runs and when it ends. Raises UserError where another process owns the
    run folder, or where the store does not answer.
    """
    where = find_place(place)
    if isinstance(where, Path):
        yield where
        return
    store = _reach(where)
    owner = _attempt(store, lambda: lease.acquire(store, tell))
    try:
        choose = choose_work if learns else choose_facts
        with _folder_of(store, choose) as folder:
            _attempt(store, lambda: store.delete(CONTROL))
            (folder / CONTROL).unlink(missing_ok=True)
            with _publishing(folder, owner, drives=True, learns=learns, tell=tell):
                yield folder
    finally:
        with contextlib.suppress(StoreError):
            lease.release(store, owner)


@contextlib.contextmanager
def join_run(place: Place, owner: str, *, learns: bool, tell: Tell) -> Iterator[Path]:
    """The folder of a learner, under the lease of its driver (``owner_of``). ``learns``: it is the
    one that writes; others have what the run goes on from."""
    where = find_place(place)
    if isinstance(where, Path):
        yield where
        return
    with _folder_of(_reach(where), choose_work) as folder:
        if not learns:
            yield folder
            return
        with _publishing(folder, owner, drives=False, learns=True, tell=tell):
            yield folder


@contextlib.contextmanager
def look_at(place: Place) -> Iterator[Path]:
    """A folder that says what a run folder holds: the files that lie right in it, and which whole
    checkpoints there are. ``refresh`` looks again, ``send`` writes a file of it back."""
    where = find_place(place)
    if isinstance(where, Path):
        yield where
        return
    with _folder_of(_reach(where), choose_facts) as folder:
        yield folder


@functools.cache
def fetch_model(url: str) -> Path:
    """A folder with what a run's policy is loaded from, as it is now; it stays until the process
    ends."""
    kept = contextlib.ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(_folder_of(_reach(str(find_place(url))), choose_model))


def name_of(path: Path) -> str:
    """What a user calls a folder or a file: its URL where it is a working folder's, else its path.
    The URL of a folder is one for a shell, with its query."""
    for folder, (store, *_) in _opened.items():
        if path == folder:
            return shlex.quote(store.url)
        if path.is_relative_to(folder):
            return f"{store.name}/{path.relative_to(folder).as_posix()}"
    return str(path)


def place_of(folder: Path) -> str:
    """What another process opens in place of a folder: its URL where it is a working folder."""
    return _opened[folder][0].url if folder in _opened else str(folder)


def owner_of(folder: Path) -> str:
    """Under which lease a folder of ``own_run`` is; "" for a plain one."""
    work = _opened[folder][3] if folder in _opened else None
    return work.owner if work is not None else ""


def check(folder: Path, tell: Tell) -> None:
    """Raises UserError where a run can no longer be published, or is another process's by now."""
    work = _opened[folder][3] if folder in _opened else None
    if work is not None:
        work.check(tell)


def refresh(folder: Path) -> None:
    """Fetches anew what others may have written; nothing for a plain folder."""
    if folder in _opened:
        store, mirror, choose, _ = _opened[folder]
        _attempt(store, lambda: mirror.fetch(choose))


def publish(folder: Path) -> None:
    """Publishes what is beside checkpoints at once; nothing for a plain folder."""
    if folder in _opened:
        store, mirror, *_ = _opened[folder]
        _attempt(store, lambda: mirror.publish(checkpoints=False))


def send(folder: Path, name: str) -> None:
    """Writes a file of a folder back; nothing for a plain one."""
    if folder in _opened:
        store = _opened[folder][0]
        _attempt(store, lambda: store.send(name, folder / name))


# --- the parts -----------------------------------------------------------------------------------


def _reach(url: str) -> Store:
    """The store of a URL, which answers and has the bucket."""
    try:
        store = Store(url)
    except StoreError as error:
        raise UserError(f"{url.partition('?')[0]} cannot be read as a URL: {error}") from error
    if not _attempt(store, store.has_bucket):
        raise UserError(
            f"{store.name}: there is no such bucket, or this key does not see it; make it first, or"
            " name another one"
        )
    return store


def _attempt(store: Store, step: Callable[[], Answer]) -> Answer:
    """What a step gives, tried for OPEN_SECONDS. Raises UserError where the store does not."""
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            return step()
        except StoreError as error:
            is_lasting = any(one in str(error) for one in _LASTING)
            if is_lasting or time.monotonic() > deadline:
                raise UserError(
                    f"{store.name}: {error}; see that the URL, AWS_ENDPOINT_URL and the key in the"
                    " environment (AWS_ACCESS_KEY_ID, AWS_PROFILE) are right, and that the key may"
                    " list, read, write and delete there"
                ) from error
            time.sleep(1.0)


@contextlib.contextmanager
def _folder_of(store: Store, choose: Choice) -> Iterator[Path]:
    """A new working folder with what is chosen, gone afterwards unless it is to be kept."""
    folder = _home() / f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    mirror = Mirror(store, folder)
    _opened[folder] = (store, mirror, choose, None)
    try:
        _attempt(store, lambda: mirror.fetch(choose))
        yield folder
    finally:
        del _opened[folder]
        if not (folder / KEPT).exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _publishing(
    folder: Path, owner: str, *, drives: bool, learns: bool, tell: Tell
) -> Iterator[None]:
    """While the body runs and when it ends, what is written in the folder is published."""
    store, mirror, choose, _ = _opened[folder]
    work = Session(store, mirror, folder, owner, drives=drives, learns=learns)
    _opened[folder] = (store, mirror, choose, work)
    work.begin()
    try:
        yield
    except BaseException as error:
        try:
            work.end(CLOSE_SECONDS)
        except Exception as failure:  # noqa: BLE001 -- the first one is raised
            if str(failure) != str(error):
                tell(str(failure))
        raise
    work.end(session.PATIENCE_SECONDS)


def _home() -> Path:
    """The folder of working folders: this user's alone. Those of processes that have ended go."""
    home = Path(tempfile.gettempdir()).resolve() / f"rlalign-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    if found.st_uid != os.getuid() or stat.S_ISLNK(found.st_mode):
        raise UserError(f"{home} must be this user's own folder; remove it, or set TMPDIR")
    for left in home.glob(f"{_machine()}-*"):
        process = left.name.split("-")[1]
        is_over = process.isdecimal() and not psutil.pid_exists(int(process))
        if is_over and not (left / KEPT).exists():
            shutil.rmtree(left, ignore_errors=True)
    return home


def _machine() -> str:
    """Eight letters for this machine: TMPDIR may be shared with others, whose processes are not
    seen here."""
    return hashlib.sha256(lease.machine().encode()).hexdigest()[:8]
