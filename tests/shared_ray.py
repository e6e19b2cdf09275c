"""The one Ray of a test process, for the files that need a cluster and nothing else of it: started
when the first asks for it, empty when the next one gets it."""

from __future__ import annotations

import sys
import time
from typing import Any

CPUS = 8
"""Logical ones."""


class _Shared:
    """Whether the Ray of this process is the one that files share, and whether a file has it."""

    runs = False
    in_use = False


def start() -> None:
    """Starts it where it does not run."""
    import ray

    assert ray.is_initialized() == _Shared.runs, "a test started Ray, or ended it, by itself"
    if not _Shared.runs:
        ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
        _Shared.runs = True
    _Shared.in_use = True


def clear() -> None:
    """Ends what a file has left on it, and returns when all places are free; the test's own time
    limit ends a hang."""
    import ray
    from ray._private import state
    from ray._private.worker import global_worker
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    _Shared.in_use = False
    worker: Any = global_worker
    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
    for name, actor in state.actors().items():
        if actor["State"] != "DEAD":
            worker.core_worker.kill_actor(ray.ActorID.from_hex(name), True)
    while ray.available_resources().get("CPU", 0.0) < CPUS:
        time.sleep(0.05)


def end() -> None:
    """Ends it where it runs and no file has it."""
    if _Shared.runs and not _Shared.in_use:
        sys.modules["ray"].shutdown()
        _Shared.runs = False
