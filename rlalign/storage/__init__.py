"""Run folders that lie on an object store, named by a URL such as ``s3://bucket/runs/first``.

A process works on such a run in a folder of its own machine, so that a Path is a Path everywhere
else in rlalign, and this room keeps the two alike:

    own_run     the driver's (or the one process's) folder, published while it is worked on
    join_run    the same for a learner of that run, on whatever machine
    look_at     what a run folder says, for a command that reads, asks or refuses
    fetch_model the newest whole checkpoint and what belongs to it
    name_of     what a user calls a folder that one of these gave

For a plain folder each gives that folder and does nothing else.

store.py    the objects under a URL, by pyarrow's file systems or fsspec's
lease.py    which process owns a run folder there
mirror.py   what is fetched, and what is published in which order
session.py  the threads that publish, and what happens when the store does not answer
folders.py  the functions above
"""

from __future__ import annotations

from rlalign.storage.folders import (
    check,
    fetch_model,
    join_run,
    look_at,
    name_of,
    own_run,
    owner_of,
    place_of,
    publish,
    refresh,
    send,
)
from rlalign.storage.store import Place, base_name, check_url, find_place, is_url

__all__ = [
    "Place",
    "base_name",
    "check",
    "check_url",
    "fetch_model",
    "find_place",
    "is_url",
    "join_run",
    "look_at",
    "name_of",
    "own_run",
    "owner_of",
    "place_of",
    "publish",
    "refresh",
    "send",
]
