"""Freed memory is kept: a process that asks for the same again meets no new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
from rlalign.core.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work(times):
    for _ in range(times):
        pieces = [bytearray(2**20 * n) for n in range(1, 8)]

def count():
    thread = threading.Thread(target=lambda: found.append(counted()))
    thread.start()
    thread.join()

def counted():
    work(3)
    before = faults()
    work(5)
    return faults() - before

found = []
if sys.argv[1] == "keep":
    print(keep_freed_memory())
count()
print(found[0])
"""


def run(kind: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own settings")
def test_pieces_that_were_freed_are_there_when_they_are_asked_for_again():
    kept, faults = run("keep")
    (others,) = run("leave")
    assert kept == "True"
    # five times 28 MB are 35,000 pages
    assert int(faults) < 1000 < int(others)


def test_who_has_settings_of_his_own_keeps_them():
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == "False"
