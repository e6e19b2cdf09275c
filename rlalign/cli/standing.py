"""What ``rlalign status`` shows of a run: rows, title -> words.

``found`` is what the run's status.json says, or what a job has published of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


def folder_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """What the status.json of a run folder says."""
    job = f", job {found['job']}" if found.get("job") else ""
    over = found["state"] not in ("starting", "running", "stopping")
    rows = {
        "run": f"{found['name']}: {found['state']}{job}",
        **progress_rows(found, over=over),
        **({} if over else pool_rows(found)),
        **node_rows(found, over=over),
    }
    if found.get("dashboard"):
        rows["Ray dashboard"] = found["dashboard"]
    rows["said"] = (
        f"{time.time() - found['updated']:.0f} s ago by process {found['process']} on"
        f" {found['host']}"
    )
    return rows


def pool_rows(found: Mapping[str, Any]) -> dict[str, str]:
    """How the workers of each role stand, and what is left to do."""
    rows = {}
    for role, pool in found.get("pools", {}).items():
        states = ", ".join(
            f"{pool[s]} {s}" for s in ("ready", "starting", "lost") if pool[s] or s == "ready"
        )
        restarts = f", {pool['restarts']} restarts" if pool["restarts"] else ""
        rows[f"{role} workers"] = f"{states} of {pool['wanted']}, {pool['busy']} busy{restarts}"
    if "queue" in found:
        rows["queue"] = f"{found['queue']} units under way"
    return rows


def node_rows(found: Mapping[str, Any], *, over: bool) -> dict[str, str]:
    """Which nodes hold the run, unless it is ``over``, and the hours that it has used of them."""
    said = found.get("nodes")
    if not said:
        return {}
    drained = f"{said['drained']} had to go so far" if said["drained"] else ""
    now = [f"{said['used']} in use", f"{said['draining']} draining" if said["draining"] else ""]
    held = ", ".join(part for part in (*([] if over else now), drained) if part)
    kinds = [f"{_kind(row)}: {row['hours']:.2f}" for row in said["kinds"]]
    by_kind = f" ({'; '.join(kinds)})" if len(kinds) > 1 else ""
    return ({"nodes": held} if held else {}) | {
        "node hours": f"{said['hours']:.2f}{by_kind}; {said['cpu_hours']:.2f} CPU hours,"
        f" {said['gpu_hours']:.2f} GPU hours"
    }


def _kind(row: Mapping[str, Any]) -> str:
    """What nodes of one price have in common: group and market, where they have one, and size."""
    sizes = [f"{row[unit]:g} {unit[:3].upper()}" for unit in ("cpus", "gpus") if row[unit]]
    return ", ".join(part for part in (row["group"], row["market"], *sizes) if part)


def progress_rows(found: Mapping[str, Any], *, over: bool) -> dict[str, str]:
    """Round, reward and time of a run; ``over`` leaves out the time that is left."""
    if not found.get("round"):
        return {"round": "none done yet"}
    rows = {"round": f"{found['round']} of {found['rounds']}"}
    if "reward" in found:
        rows["reward"] = f"{found['reward']:.4f}"
    rows["seconds a round"] = f"{found['seconds_per_round']:.1f}"
    # a reward that takes a tenth of a round or more is worth a look
    slow = {title: s for title, s in found.get("reward_shares", {}).items() if s >= 0.1}
    if slow:
        said = [f"{title} {100 * share:.0f} %" for title, share in slow.items()]
        rows["slow rewards"] = f"{', '.join(said)} of the last round"
    if not over:
        rows["time left"] = _clock(found["eta_seconds"])
    return rows


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
