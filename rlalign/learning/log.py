"""What a run logs, to every sink of its ``log``: each has a thread of its own, and none of them
stops the run.

    round, evaluation --> metrics.jsonl (the truth)
                     \\-> queue -> thread -> tensorboard
                     \\-> queue -> thread -> wandb

A sink that raises is told of once, and asked again with the next line; after ``MOST_FAILURES`` in a
row it is left out. One that hangs holds up nothing until the run's end, which waits
``CLOSE_SECONDS`` for it. No note shows a value of the environment that is a secret.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rlalign.core.registry import UserError, read_reason
from rlalign.sinks.base import Origin, Sink, Writer

MOST_FAILURES = 3
CLOSE_SECONDS = 60.0
_SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")
_LONGEST_REASON = 300

Job = Callable[[Writer], None]


class Log:
    """The sinks of a run, open until ``close``, which waits ``patience`` seconds for them."""

    def __init__(
        self, sinks: Sequence[Sink], origin: Origin, *, patience: float = CLOSE_SECONDS
    ) -> None:
        self._patience = patience
        self._notes: deque[str] = deque()
        self._threads = [_SinkThread(sink, origin, self._notes.append) for sink in sinks]

    def write(self, record: Mapping[str, Any]) -> None:
        """A round's record, or an evaluation's: its finite numbers."""
        values = {
            key: float(value)
            for key, value in record.items()
            if key != "round" and isinstance(value, int | float) and math.isfinite(value)
        }
        self._put(lambda writer: writer.write(record["round"], values))

    def show(self, round: int, picture: Path) -> None:
        """A picture of an evaluation."""
        self._put(lambda writer: writer.show(round, picture))

    def keep(self, file: Path) -> None:
        """A file of the run; one that is not there is left out."""
        if file.is_file():
            self._put(lambda writer: writer.keep(file))

    def take_notes(self) -> list[str]:
        """What there is to be told to the user since the last time."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def close(self, *, ended: bool) -> None:
        """Writes what is left and closes every sink; gives up on those that take too long."""
        for thread in self._threads:
            thread.end(ended)
        deadline = time.monotonic() + self._patience
        for thread in self._threads:
            thread.wait(deadline - time.monotonic())

    def _put(self, job: Job) -> None:
        for thread in self._threads:
            thread.put(job)


class _SinkThread:
    """A sink, its queue, and the thread between."""

    def __init__(self, sink: Sink, origin: Origin, tell: Callable[[str], None]) -> None:
        self._sink = sink
        self._origin = origin
        self._tell = tell
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._ended = False
        self._is_closed = False
        self._writer: Writer | None = None
        self._failures = 0
        self._has_told = False
        self._thread = threading.Thread(target=self._work, name=f"log {sink.name}", daemon=True)
        self._thread.start()
        # what cannot be connected is told now, and not with the first round
        self.put(lambda writer: None)

    def put(self, job: Job) -> None:
        """Something to write, when its turn comes."""
        self._jobs.put(job)

    def end(self, ended: bool) -> None:
        """Nothing more comes. May be said twice."""
        if not self._is_closed:
            self._ended = ended
            self._jobs.put(None)
        self._is_closed = True

    def wait(self, seconds: float) -> None:
        """Until everything is written, or the time is up."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._tell(
                f"log: {self._sink.name} does not come to an end; what it has not written by now is"
                " in metrics.jsonl"
            )

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._failures < MOST_FAILURES:
                self._attempt(job)
        if self._writer is not None and self._failures < MOST_FAILURES:
            self._attempt(lambda writer: writer.close(self._ended))

    def _attempt(self, job: Job) -> None:
        try:
            if self._writer is None:
                self._writer = self._sink.connect(self._origin)
            job(self._writer)
            self._failures = 0
        except Exception as error:  # whatever a sink raises, it must not end the run
            self._failures += 1
            self._say_why(error)

    def _say_why(self, error: Exception) -> None:
        name = self._sink.name
        if not self._has_told:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = hide_secrets(f"{kind}{read_reason(error)}")
            self._tell(
                f"log: {name} failed ({reason[:_LONGEST_REASON]}); the run goes on, and"
                " metrics.jsonl has every number"
            )
        elif self._failures == MOST_FAILURES:
            self._tell(f"log: {name} failed {MOST_FAILURES} times in a row and is left out")
        self._has_told = True


def check_sinks(sinks: Sequence[Sink]) -> None:
    """Raises UserError for a sink that cannot be used on this machine: a package that is
    missing."""
    for number, sink in enumerate(sinks):
        sink.check(f"log.{number}")


def hide_secrets(text: str) -> str:
    """The text without the values of variables of the environment that are secrets by their name,
    and without passwords in addresses."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", r"\1***@", text)


def hide_secrets_in(settings: Any) -> Any:
    """Nested settings whose texts are without secrets."""
    if isinstance(settings, Mapping):
        return {key: hide_secrets_in(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [hide_secrets_in(value) for value in settings]
    return hide_secrets(settings) if isinstance(settings, str) else settings
