"""Memory that the C library is given back is kept for the next pass.

A pass of a network on a CPU asks for the same tens of megabytes as the one before it. glibc gives
what is freed back to the system and asks for it again, and the system provides it page by page,
filled with zeros: a tenth of a small network's time. Where tensors lie changes no number.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
ARENA_MAX = -8
"""Parameters of glibc's mallopt, from malloc.h."""
LARGEST = 32 * 2**20
"""Bytes of the largest piece that is kept; larger ones go back at once."""
MOST = 2**31 - 1
"""Bytes of free memory at the heap's end that are kept."""
OWN_SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
"""Environment variables by which glibc is told the same."""


def keep_freed_memory() -> bool:
    """Has this process keep freed pieces of up to 32 MB, 2 GB of them at the heap's end, in one
    heap for all its threads. Does nothing, and returns False, where the C library is another one
    than glibc, or where the environment has settings of its own for it."""
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, MOST))
    done = [mallopt(parameter, value) for parameter, value in wanted]
    return all(done)
