"""Ends what a test process leaves running: its own Ray, its servers, the runs it has started.

pytest-timeout ends a process whose test hangs without any clean-up. What that process has started
would go on, take the cores and slow down every test after it. So each process that runs tests puts
a mark into its environment, which everything it starts inherits, however far down and in whatever
session; and it starts this file, which waits for its end and then kills what carries the mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "RLALIGN_TESTS_OF"


def watch() -> None:
    """Marks this process's children from now on, and starts the process that waits for its end."""
    os.environ[MARK] = str(os.getpid())
    # in a session of its own: Ctrl-C in the terminal must not end it before the tests
    subprocess.Popen(
        [sys.executable, __file__, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def marked(owner: int) -> Iterator[psutil.Process]:
    """The living processes that carry the mark of the process ``owner``."""
    mark = f"{MARK}={owner}".encode()
    for process in psutil.process_iter():
        with suppress(OSError):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                yield process


def kill_after(owner: int) -> None:
    """Waits for the end of ``owner``, this process's parent; kills what is left, also what that
    starts meanwhile."""
    while os.getppid() == owner:
        time.sleep(0.5)
    while left := [process for process in marked(owner) if process.pid != os.getpid()]:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.1)


if __name__ == "__main__":
    kill_after(int(sys.argv[1]))
