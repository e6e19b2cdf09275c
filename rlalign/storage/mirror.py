"""A folder of this machine and a run folder on a store, kept alike.

What can be seen in the store is whole, whenever a process is killed: files go up as whole objects;
what a round writes goes before the checkpoint that covers it; of a checkpoint the tensors go first
and ``state.json`` last; an older checkpoint is removed after the newer one is there, its
``state.json`` first. A checkpoint without both is none: it is left aside by whoever reads, and
removed by whoever writes next.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rlalign.storage.store import Store, StoreError

STATE = "state.json"
TENSORS = "state.safetensors"
OF_DRIVER = ("status.json", "control.json")
"""Files that the driver keeps, or is asked by; session.py carries them more often."""
_NOT_WORKED_ON = ("policy", "tensorboard", "wandb", "preferences")
"""Folders of a run that nothing reads when it goes on."""
_CHECKPOINT = re.compile(r"checkpoints/round-(\d{5,})/([^/]+)")
_MOST_STAND_INS = 1000
_ATTEMPTS = 3

Listing = Mapping[str, int]
"""Name -> bytes of every object of a run folder."""
Choice = Callable[[Listing], list[str]]
"""Which objects of a listing are fetched."""


class _Stamp(NamedTuple):
    """A file as it was: another one has another stamp."""

    size: int
    changed: int
    number: int


class Mirror:
    """What this process has of a run folder on a store, and what it has published.

    Only names that this process has fetched, stood in for or published are ever removed there, and
    checkpoints by the process that writes them.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, _Stamp] = {}
        self._rounds: dict[int, set[str]] = {}
        """Round -> names of its checkpoint's objects in the store."""

    def fetch(self, choose: Choice) -> None:
        """Fetches what is chosen, over what is here. What has gone meanwhile is looked for anew."""
        with self._lock:
            self._fetch(choose)

    def _fetch(self, choose: Choice) -> None:
        for attempt in range(_ATTEMPTS):
            listing = self._store.list()
            self._rounds = {}
            for name in listing:
                if found := _CHECKPOINT.fullmatch(name):
                    self._rounds.setdefault(int(found.group(1)), set()).add(name)
            try:
                for name in choose(listing):
                    self._store.fetch(name, self._folder / name)
                    self._remember(name)
            except FileNotFoundError as error:
                if attempt == _ATTEMPTS - 1:
                    raise StoreError(f"{error}: it changes as fast as it is read") from error
                continue
            if not has_begun(listing):
                self._stand_in(listing)
            return

    def _stand_in(self, listing: Listing) -> None:
        """Empty files for what a run that never began has left, or somebody else: what is there is
        seen by its name."""
        for name in list(listing)[:_MOST_STAND_INS]:
            path = self._folder / name
            if not path.exists() and not _CHECKPOINT.fullmatch(name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                self._remember(name)

    def _remember(self, name: str) -> None:
        if name not in OF_DRIVER:
            self._known[name] = _stamp(self._folder / name)

    def publish(self, *, checkpoints: bool) -> None:
        """Brings the store to what the folder is. Raises StoreError where it does not take it; what
        has been sent is not sent again."""
        with self._lock:
            self._publish(checkpoints)

    def _publish(self, checkpoints: bool) -> None:
        found = dict(self._scan())
        changed = [name for name, stamp in found.items() if self._known.get(name) != stamp]

        # what is beside checkpoints
        for name in changed:
            if not _CHECKPOINT.fullmatch(name):
                self._send(name, found[name])
        if checkpoints:
            self._publish_checkpoints(found, changed)

        # what has gone here goes there
        for name in [name for name in self._known if name not in found]:
            if not _CHECKPOINT.fullmatch(name):
                self._store.delete(name)
                del self._known[name]

    def _publish_checkpoints(self, found: Mapping[str, _Stamp], changed: list[str]) -> None:
        # the newest first: older ones may go here while it is sent
        here = {int(m.group(1)) for name in found if (m := _CHECKPOINT.fullmatch(name))}
        for round in sorted(here, reverse=True):
            tensors, state = (f"checkpoints/round-{round:05d}/{one}" for one in (TENSORS, STATE))
            if state in changed and tensors in found:
                self._rounds.setdefault(round, set()).update((tensors, state))
                self._send_checkpoint(tensors, state, found)

        # after the new ones, those that are here no longer, and what a killed process left half
        for round in sorted(self._rounds.keys() - here):
            for name in sorted(self._rounds[round], key=lambda one: not one.endswith(STATE)):
                self._store.delete(name)
                self._known.pop(name, None)
            del self._rounds[round]

    def _send(self, name: str, stamp: _Stamp) -> None:
        """Sends a file that is as ``stamp`` says, or newer; one that has gone meanwhile is left
        out."""
        with contextlib.suppress(FileNotFoundError):
            self._store.send(name, self._folder / name)
            self._known[name] = stamp

    def _send_checkpoint(self, tensors: str, state: str, found: Mapping[str, _Stamp]) -> None:
        """Sends a checkpoint whole, also where its files go while it is sent, or not at all."""
        with contextlib.suppress(FileNotFoundError):
            facts = (self._folder / state).read_bytes()
            self._store.send(tensors, self._folder / tensors)
            self._store.put(state, facts)
            self._known |= {name: found[name] for name in (tensors, state)}

    def _scan(self) -> Iterator[tuple[str, _Stamp]]:
        """Every file of the folder with its stamp; what is hidden, or a link, is left aside."""
        for place, folders, files in os.walk(self._folder):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            for file in sorted(files):
                path = Path(place, file)
                name = path.relative_to(self._folder).as_posix()
                if file.startswith(".") or file.endswith(".tmp") or name in OF_DRIVER:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink():
                        yield name, _stamp(path)


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


# --- what is fetched -----------------------------------------------------------------------------


def has_begun(listing: Listing) -> bool:
    """Whether the run folder holds a line of metrics, or a whole checkpoint."""
    return listing.get("metrics.jsonl", 0) > 0 or bool(whole_rounds(listing))


def whole_rounds(listing: Listing) -> list[int]:
    """The rounds whose checkpoints have both files, in their order."""
    found = [m for name in listing if (m := _CHECKPOINT.fullmatch(name)) and m.group(2) == STATE]
    rounds = sorted(int(m.group(1)) for m in found)
    return [r for r in rounds if f"checkpoints/round-{r:05d}/{TENSORS}" in listing]


def choose_facts(listing: Listing) -> list[str]:
    """What says how a run stands: the files beside its folders, and which checkpoints there are."""
    plain = [name for name in listing if "/" not in name]
    return plain + _states(listing)


def choose_work(listing: Listing) -> list[str]:
    """What a run goes on from: all but the tensors of older checkpoints and what nothing reads."""
    plain = [
        name
        for name in listing
        if name.partition("/")[0] not in ("checkpoints", "control.json", *_NOT_WORKED_ON)
    ]
    return plain + _newest(listing) + _states(listing)


def choose_model(listing: Listing) -> list[str]:
    """What a run's policy is loaded from: its newest checkpoint, or an exported pipeline."""
    if "config.yaml" in listing and whole_rounds(listing):
        kept = [name for name in listing if name.partition("/")[0] in ("config.yaml", "refits")]
        return kept + _newest(listing) + _states(listing)
    if "model_index.json" in listing:
        return list(listing)
    return [name for name in listing if name.startswith("policy/") or name == "config.yaml"]


def _newest(listing: Listing) -> list[str]:
    rounds = whole_rounds(listing)
    return [f"checkpoints/round-{rounds[-1]:05d}/{TENSORS}"] if rounds else []


def _states(listing: Listing) -> list[str]:
    return [f"checkpoints/round-{round:05d}/{STATE}" for round in whole_rounds(listing)]
