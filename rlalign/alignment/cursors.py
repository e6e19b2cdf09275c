"""Which votes of people a round sees, where a run learns from such: decided once, by the main
learner, and written down before the round.

A checkpoint has the cursors of the rounds up to it; ``votes.json`` in the run folder has those of
the rounds since, so that a run that was killed sees the same votes when it does them again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.alignment import control
from rlalign.core.files import write_whole
from rlalign.data.pairs.growing import GrowingPairs
from rlalign.data.pairs.reader import Pairing
from rlalign.learning import checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "votes.json"
WAITING = "votes/waiting"
"""1 while a round waits for votes, 0 when it has waited: a metric of the cluster."""


def resume(pairs: Pairing | None, folder: Path, saved: Mapping[str, Any]) -> None:
    """Takes up the cursors of a checkpoint's facts, and those that were written down since."""
    if not isinstance(pairs, GrowingPairs):
        return
    kept = list(saved.get("cursors", ()))
    since = read_cursors(folder)
    pairs.load({"cursors": since if since[: len(kept)] == kept else kept})


def read_cursors(folder: Path) -> list[int]:
    """The cursors that a run has written down so far; none where it has not."""
    with contextlib.suppress(OSError, ValueError):
        return list(json.loads((folder / FILE).read_bytes())["cursors"])
    return []


def facts(pairs: Pairing | None) -> Mapping[str, Any]:
    """What a checkpoint keeps of the pairs; nothing where files alone decide."""
    return pairs.facts() if isinstance(pairs, GrowingPairs) else {}


def wait(
    pairs: Pairing,
    number: int,
    folder: Path,
    accelerator: Accelerator,
    on_record: Callable[[dict[str, Any]], None],
) -> bool:
    """Waits for the votes that round ``number`` wants; false where the run is asked to stop."""
    assert isinstance(pairs, GrowingPairs), "only a set that grows is waited for"
    ready = True
    if accelerator.is_main_process:
        known = len(pairs.cursors)
        waited = False

        def say(missing: str) -> None:
            nonlocal waited
            waited = True
            on_record({"note": missing, WAITING: 1})

        ready = pairs.wait(number, say, stopped=lambda: control.asked(folder).stop)
        if waited and ready:
            on_record({"note": "the votes are there", WAITING: 0})
        if len(pairs.cursors) > known:
            with checkpoint.disk_errors(folder):
                write_whole(folder / FILE, json.dumps(dict(pairs.facts())))
    return _agree(pairs, ready, accelerator)


def _agree(pairs: GrowingPairs, ready: bool, accelerator: Accelerator) -> bool:
    """What the main process has found, in all of them."""
    from accelerate.utils import broadcast_object_list

    if accelerator.num_processes > 1:
        said = [ready, dict(pairs.facts())]
        broadcast_object_list(said)
        ready, decided = said
        pairs.load(decided)
    return ready
