"""A run folder on a store while a process works on it: two threads that publish, and what happens
when the store does not answer.

    heartbeat   the lease, control.json and status.json, every few seconds
    publisher   everything else that the run writes, while the run goes on

A store that fails is asked again, and the run goes on meanwhile; after ``PATIENCE_SECONDS`` without
an answer it is told so at its next ``check`` and ends, with its local copy kept.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rlalign.core.files import write_whole
from rlalign.core.registry import UserError
from rlalign.storage import lease
from rlalign.storage.mirror import Mirror
from rlalign.storage.store import Store

PERIOD_SECONDS = 3.0
"""Between two looks at what is to be published."""
MOST_PERIOD_SECONDS = 60.0
"""Where publishing itself takes long: a sixth of the time, and not less often than this."""
PATIENCE_SECONDS = 600.0
"""A store that has not taken anything for so long ends the run."""
KEPT = ".kept"
"""A file in a local copy that has something which is not in the store."""
CONTROL, STATUS = "control.json", "status.json"


class Session:
    """One process at work on a run folder of a store.

    ``drives``: it renews the lease and says how the run stands. ``learns``: it writes checkpoints.
    """

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        folder: Path,
        owner: str,
        *,
        drives: bool,
        learns: bool,
    ) -> None:
        self.store = store
        self.mirror = mirror
        self.folder = folder
        self.owner = owner
        self._drives = drives
        self._learns = learns
        self._control: bytes | None = None
        self._status = b""
        self._renewed = time.monotonic()
        self._notes: deque[str] = deque()
        self._error: Exception | None = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Publishes from now on."""
        for name, step in (("heartbeat", self._beat), ("publisher", self._publish)):
            loop = threading.Thread(target=self._repeat, args=(step,), name=name, daemon=True)
            self._threads.append(loop)
            loop.start()

    def check(self, tell: Callable[[str], None]) -> None:
        """Tells what there is to tell. Raises UserError where the run cannot go on here."""
        while self._notes:
            tell(self._notes.popleft())
        if self._error is not None:
            raise self._error

    def end(self, patience_seconds: float) -> None:
        """Publishes what is left. Raises UserError, with the local copy kept, where the store does
        not take it in that time."""
        self._over.set()
        for thread in self._threads:
            thread.join(patience_seconds)
        deadline = time.monotonic() + patience_seconds
        while self._error is None:
            try:
                self._publish()
                if self._drives:
                    self._send_status()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    self._give_up(error, patience_seconds)
                time.sleep(min(1.0, patience_seconds / 10))
        self.keep()
        raise self._error

    def keep(self) -> None:
        """Marks the local copy as one that has what the store has not."""
        with contextlib.suppress(OSError):
            (self.folder / KEPT).touch()

    def _repeat(self, step: Callable[[], None]) -> None:
        """A thread's loop: the step again and again, until the end or until it is given up."""
        worked = time.monotonic()
        is_failing = False
        pause = 0.0
        while self._error is None and not self._over.wait(pause):
            began = time.monotonic()
            try:
                step()
                worked = time.monotonic()
                if is_failing:
                    self._notes.append(f"{self.store.name} answers again")
                is_failing = False
            except OSError as error:
                if not is_failing:
                    self._notes.append(
                        f"{self.store.name}: {error}; the run goes on, and asks again for up to"
                        f" {PATIENCE_SECONDS:.0f} s"
                    )
                is_failing = True
                if time.monotonic() - worked > PATIENCE_SECONDS:
                    self._give_up(error, PATIENCE_SECONDS)
            except Exception as error:  # noqa: BLE001 -- raised where the run looks
                self._error = self._error or error
            took = time.monotonic() - began
            pause = min(MOST_PERIOD_SECONDS, max(PERIOD_SECONDS, 5 * took))

    def _give_up(self, error: OSError, seconds: float) -> None:
        self.keep()
        self._error = self._error or UserError(
            f"{self.store.name} did not take what the run writes for {seconds:.0f} s ({error}); the"
            f" local copy is kept in {self.folder}. Mend that, then go on with: rlalign train"
            f" --resume {self.store.url}, or from the copy: rlalign train --resume {self.folder}"
        )

    def _publish(self) -> None:
        self._confirm()
        self.mirror.publish(checkpoints=self._learns)

    def _confirm(self) -> None:
        """Raises UserError where another process owns the run folder by now."""
        if other := lease.other_owner(self.store, self.owner):
            self.keep()
            raise UserError(
                f"{self.store.name} is written by {other} by now, which found this process silent"
                f" for {lease.LEASE_SECONDS:.0f} s; this one stops, and its local copy is kept in"
                f" {self.folder}"
            )

    def _beat(self) -> None:
        if self._drives and time.monotonic() - self._renewed > lease.RENEW_SECONDS:
            self._confirm()
            lease.renew(self.store, self.owner)
            self._renewed = time.monotonic()
        self._exchange_control()
        if self._drives:
            self._send_status()

    def _exchange_control(self) -> None:
        """What the run itself asks for goes up, what commands ask for comes down."""
        path = self.folder / CONTROL
        mine = _read(path)
        if self._drives and mine is not None and mine != self._control:
            self.store.put(CONTROL, mine)
            self._control = mine
            return
        with contextlib.suppress(FileNotFoundError):
            said = self.store.read(CONTROL)
            if said != self._control:
                write_whole(path, said)
                self._control = said

    def _send_status(self) -> None:
        said = _read(self.folder / STATUS)
        if said is not None and said != self._status:
            self.store.put(STATUS, said)
            self._status = said


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None
