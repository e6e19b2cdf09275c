"""Runs as Ray jobs, over the cluster's HTTP interface: submit, list, status, logs, stop, and the
run's own commands there.

Each has an equal among Ray's own commands; docs/cluster.md shows them.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.core.registry import UserError, nearest, read_reason
from rlalign.runtime.jobs.dashboard import TIMEOUT_SECONDS, Dashboard
from rlalign.runtime.jobs.publish import status_name
from rlalign.storage import base_name

OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Cluster(Dashboard):
    """A cluster's jobs, over its dashboard."""

    def jobs(self) -> list[dict[str, Any]]:
        """The cluster's jobs that are runs of rlalign, newest first."""
        known = self.ask("/api/jobs/")
        if not isinstance(known, list):
            raise UserError(f"--address {self.address}: what answers there is no Ray dashboard")
        found = [j for j in known if (j.get("metadata") or {}).get("rlalign")]
        return sorted(found, key=lambda j: j.get("start_time") or 0, reverse=True)

    def job(self, name: str) -> dict[str, Any]:
        """A job by its submission id. Raises UserError where there is none."""
        if not _ID.fullmatch(name):
            raise UserError(f"{name!r} is no job id: letters, digits, '.', '_' and '-'")
        try:
            return self.ask(f"/api/jobs/{name}")
        except KeyError as error:
            known = [j["submission_id"] for j in self.jobs()]
            raise UserError(
                f"there is no job {name!r} at {self.address};"
                f" {nearest(name, known) if known else 'there are no runs'}"
            ) from error

    def logs(self, name: str) -> str:
        """What the job has printed so far, all of it."""
        return self.ask(f"/api/jobs/{name}/logs")["logs"] or ""

    def standing(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The status.json of the run that is a job; empty where there is none of this job (yet)."""
        if not job.get("driver_node_id"):
            return {}  # it has not started
        name = status_name(job["submission_id"])
        where = f"node_id={job['driver_node_id']}&filename={name}&lines=10"
        try:
            found = json.loads(self.read(f"/api/v0/logs/file?{where}", absent=(404, 500)))
        except (KeyError, json.JSONDecodeError):
            return {}
        # a later job may have gone on with the run folder
        return found if found.get("job") == job["submission_id"] else {}

    def follow(self, name: str, say: Callable[[str], None]) -> None:
        """Says what the job prints, piece by piece as Ray sends it, until the job is over."""
        from aiohttp import ClientError

        try:
            asyncio.run(self.stream(f"/api/jobs/{name}/logs/tail", say))
        except (ClientError, OSError, ValueError) as error:
            raise UserError(
                f"--address {self.address} tells no more of what job {name} says"
                f" ({self.quote(str(error))}); ask again: rlalign logs -f {name}"
            ) from error

    def submit(
        self,
        entrypoint: str,
        metadata: Mapping[str, str],
        *,
        name: str = "",
        folder: Path | None = None,
    ) -> str:
        """Hands a command to Ray Jobs and returns its id. ``folder`` becomes its working
        directory."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                return self.ray_client().submit_job(
                    entrypoint=entrypoint,
                    submission_id=name or None,
                    metadata=dict(metadata),
                    runtime_env={"working_dir": str(folder)} if folder else None,
                )
            except UserError:
                raise
            # what requests raises is an OSError
            except (RuntimeError, OSError, ValueError) as error:
                if "No available agent" in str(error) and time.monotonic() < deadline:
                    time.sleep(1.0)  # the head has only just started
                    continue
                raise UserError(
                    f"--address {self.address} did not take the job:"
                    f" {self.quote(read_reason(error, -1))}"
                ) from error


def _job_name(name: str, run: str) -> str:
    name = name or f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not _ID.fullmatch(name):
        raise UserError(f"--id must be letters, digits, '.', '_' and '-', got {name!r}")
    return name


def _there(folder: str) -> str:
    """A folder of the cluster in a shell's words; only a leading ~ means what it means there."""
    return f'"$HOME"/{shlex.quote(folder[2:])}' if folder.startswith("~/") else shlex.quote(folder)


def submit_run(
    cluster: Cluster, text: str, settings: Mapping[str, Any], *, name: str, out: str
) -> tuple[str, str, list[str]]:
    """Submits a resolved run file. Returns (job id, run folder on the cluster, packed files)."""
    from rlalign import __version__
    from rlalign.runtime.jobs.pack import pack

    name = _job_name(name, settings["name"])
    folder = out or f"~/rlalign-runs/{name}"
    with tempfile.TemporaryDirectory() as scratch:
        packed = pack(text, dict(settings), Path(scratch))
        command = f"python -m rlalign train run.yaml --address auto --out {_there(folder)}"
        metadata = {"rlalign": __version__, "run": settings["name"], "folder": folder}
        job = cluster.submit(command, metadata, name=name, folder=Path(scratch))
    return job, folder, packed


def resume_run(
    cluster: Cluster, folder: str, settings: Any, *, name: str, more: Sequence[str] = ()
) -> str:
    """Submits the rest of a run whose folder is on the cluster, with the plug-ins of ``settings``.
    Returns the job's id."""
    from rlalign import __version__
    from rlalign.runtime.jobs.pack import pack

    name = _job_name(name, base_name(folder))
    resume = f"python -m rlalign train --resume {_there(folder)} --address auto"
    command = f"{resume} {shlex.join(more)}".strip()
    metadata = {"rlalign": __version__, "run": base_name(folder), "folder": folder}
    with tempfile.TemporaryDirectory() as scratch:
        pack("# the run folder has its own\n", settings, Path(scratch))
        return cluster.submit(command, metadata, name=name, folder=Path(scratch))


def run_there(cluster: Cluster, job: Mapping[str, Any], command: Sequence[str]) -> tuple[bool, str]:
    """Runs ``rlalign COMMAND FOLDER ...`` on the cluster's head, for a run that is a job. Returns
    (success, output)."""
    folder = (job.get("metadata") or {}).get("folder", "")
    if not folder:
        raise UserError(
            f"job {job['submission_id']} is no run that rlalign submitted; it has no run folder"
        )
    verb, *rest = command
    there = f"python -m rlalign {shlex.quote(verb)} {_there(folder)} {shlex.join(rest)}"
    helper = cluster.submit(there, {"helper": verb})
    while (status := cluster.job(helper)["status"]) not in OVER:
        time.sleep(0.5)

    # what comes before is Ray's
    output = cluster.logs(helper).partition("Running entrypoint")[2].partition("\n")[2]
    return status == "SUCCEEDED", output
