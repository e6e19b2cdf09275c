"""Asking a run for something while it runs, and seeing how it stands: two small files of its
folder.

``control.json`` holds what was asked (workers, stop); commands write it, the run reads it twice a
second. ``status.json`` says how the run stands; the run writes it. So a run needs no port for
either, and whoever may write its folder may steer it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlalign.core.files import write_whole
from rlalign.core.registry import UserError
from rlalign.learning.shares import reward_shares
from rlalign.storage import name_of

if TYPE_CHECKING:
    from accelerate import Accelerator

SILENT_SECONDS = 30.0
"""A run that says nothing for so long has died or its folder is not shared with this machine."""
OVER = ("ended", "stopped", "failed")


class Asked(BaseModel):
    """What a run was asked for since it started; None and absent rewards mean: as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rollout_workers: int | None = Field(default=None, ge=1)
    reward_workers: dict[str, int] = Field(default_factory=dict)
    stop: bool = False


def asked(folder: Path) -> Asked:
    """What the run in ``folder`` was asked for. A damaged file asks for nothing."""
    try:
        return Asked.model_validate_json((folder / "control.json").read_bytes())
    except (OSError, ValidationError):
        return Asked()


def ask(folder: Path, **changes: Any) -> Asked:
    """Adds to what the run is asked for."""
    # torch, which reading a status must not wait for
    from rlalign.learning import checkpoint

    wanted = Asked.model_validate({**asked(folder).model_dump(), **changes})
    with checkpoint.disk_errors(folder):
        write_whole(folder / "control.json", wanted.model_dump_json())
    return wanted


def forget(folder: Path) -> None:
    """A run starts: what an earlier one was asked for is no longer asked."""
    (folder / "control.json").unlink(missing_ok=True)


def stop_or_leave(
    folder: Path, leaves: Callable[[], bool], accelerator: Accelerator
) -> tuple[bool, bool]:
    """Whether a stop was asked for, and whether the run has to go on on another machine: what the
    main learner process reads and hears of ``leaves``, in all of them.

    Asked where no round is ordered: a run that goes on from there orders under the same weights as
    one that never stopped.
    """
    said = (False, False)
    if accelerator.is_main_process:
        said = (asked(folder).stop, leaves())
    return agreed(said, accelerator)


def agreed(value: Any, accelerator: Accelerator) -> Any:
    """The main learner process's value, in all of them."""
    from accelerate.utils import broadcast_object_list

    said = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(said)
    return said[0]


class Status:
    """Writes ``status.json``: state, round, reward, workers, what is left."""

    def __init__(self, folder: Path, rounds: int, **facts: Any) -> None:
        self._folder = folder
        self._seconds = deque[float](maxlen=10)
        self._facts: dict[str, Any] = {"state": "starting", "round": 0, "rounds": rounds, **facts}
        with contextlib.suppress(OSError, ValueError):  # what was counted before goes on to count
            said = json.loads((folder / "status.json").read_bytes())
            self._facts |= {"nodes": said["nodes"]} if "nodes" in said else {}
        self._facts |= {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.time(),
        }

    @property
    def nodes(self) -> Mapping[str, Any]:
        """What the run's last driver on a cluster has said of nodes and their hours."""
        return self._facts.get("nodes", {})

    def record(self, line: Mapping[str, Any]) -> None:
        """Takes what concerns it from whatever a run reports."""
        if "seconds/round" not in line:
            return
        self._seconds.append(line["seconds/round"])
        facts = self._facts
        facts["round"] = line["round"]
        facts["staleness"] = line["staleness/max"]
        if "reward/total/mean" in line:
            facts["reward"] = line["reward/total/mean"]
        facts["seconds_per_round"] = statistics.median(self._seconds)
        facts["eta_seconds"] = (facts["rounds"] - line["round"]) * facts["seconds_per_round"]
        facts["reward_shares"] = reward_shares([line])
        self.write(state="running" if facts["state"] == "starting" else facts["state"])

    def write(self, **facts: Any) -> None:
        """Writes the file whole, with these facts and the time. A full disk does not end a run
        here: its checkpoint will."""
        self._facts |= facts
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self._facts, "updated": time.time()})
            write_whole(self._folder / "status.json", text)


def status_of(folder: Path) -> dict[str, Any]:
    """How the run in ``folder`` stands; ``state`` is ``lost`` where its process is gone. Raises
    UserError where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "status.json").read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{name_of(folder)} has no status.json; name the folder of a run that was started"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name_of(folder / 'status.json')} cannot be read ({error}); is it a run folder?"
        ) from error
    if found["state"] not in OVER and not _alive(found):
        found["state"] = "lost"
    return found


def _alive(found: Mapping[str, Any]) -> bool:
    if found["host"] == socket.gethostname():
        try:
            os.kill(found["process"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return time.time() - found["updated"] < SILENT_SECONDS
