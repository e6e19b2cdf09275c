"""Who owns a run folder on a store, on a file system of fsspec's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlalign.core.registry import UserError
from rlalign.storage import lease
from rlalign.storage.store import Store

pytestmark = pytest.mark.usefixtures("often")


def silent(note: str) -> None:
    raise AssertionError(note)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"local://{tmp_path}/run")


def test_the_first_owns_it_and_gives_it_back(store: Store) -> None:
    owner = lease.acquire(store, silent)
    assert lease.other_owner(store, owner) == ""
    assert lease.other_owner(store, "another") == f"process {os.getpid()} on {os.uname().nodename}"
    lease.release(store, "another")
    assert json.loads(store.read(lease.NAME))["owner"] == owner
    lease.release(store, owner)
    assert store.list() == {}
    with pytest.raises(FileNotFoundError):
        store.read(lease.NAME)


def test_who_renews_is_not_taken_over(store: Store) -> None:
    owner = lease.acquire(store, silent)
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.01):
            lease.renew(store, owner)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on .*stop"):
            lease.acquire(store, lambda _: None)
    finally:
        over.set()
        thread.join()
    assert lease.other_owner(store, owner) == ""


def test_who_is_silent_is_waited_for_and_then_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    first = lease.acquire(store, silent)
    notes: list[str] = []
    second = lease.acquire(store, notes.append)
    assert len(notes) == 1
    assert "waiting up to 0 s to see whether that one is still there" in notes[0]
    assert lease.other_owner(store, first) != ""
    lease.release(store, first)
    assert lease.other_owner(store, second) == ""


def test_an_owner_of_this_machine_that_has_ended_is_not_waited_for(store: Store) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lease.renew(store, "before")
    said = json.loads(store.read(lease.NAME))
    store.put(lease.NAME, json.dumps({**said, "process": ended.pid}).encode())
    lease.acquire(store, silent)


def test_a_damaged_lease_is_nobodys(store: Store) -> None:
    store.put(lease.NAME, b"{")
    lease.acquire(store, silent)


def test_of_two_at_once_one_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that there is none, and both write."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)
    outcomes: list[str] = []
    both = threading.Barrier(2)

    class Together(Store):
        def put(self, name: str, content: bytes) -> None:
            both.wait()
            super().put(name, content)

    def start() -> None:
        try:
            outcomes.append(lease.acquire(Together(store.url), lambda _: None))
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in outcomes if "is being written by" in one]) == 1
    winner = next(one for one in outcomes if " " not in one)
    assert lease.other_owner(store, winner) == ""
