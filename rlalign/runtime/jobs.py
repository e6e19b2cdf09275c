"""Runs as Ray jobs, over the cluster's HTTP interface: submit, list, status, logs, stop, and the run's own commands there.

Each has an equal among Ray's own commands; docs/cluster.md shows them. The token comes from where Ray keeps it
(``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``) and travels in a header only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlalign.registry import UserError, nearest

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

TIMEOUT_SECONDS = 10.0
TAIL_LINES = (1_000, 20_000)
"""Of a job's log, that are searched for its last rounds."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_ROUND = re.compile(r"^round +(\d+)/(\d+)(?:.*?reward ([+-]\d+\.\d+))?.*? (\d+\.\d) s \(", re.MULTILINE)
_ACTOR = re.compile(r".*/(rollout|reward-.+|coordinator)-\d+")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def token() -> str:
    """The cluster's token, from where Ray itself looks for it; "" where there is none."""
    if found := os.environ.get("RAY_AUTH_TOKEN"):
        return found
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class Cluster:
    """A cluster's dashboard, by its URL."""

    def __init__(self, address: str) -> None:
        self.address = (address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or "http://127.0.0.1:8265").rstrip("/")
        if urlsplit(self.address).scheme not in ("http", "https") or not urlsplit(self.address).hostname:
            raise UserError(
                f"--address must be the URL of the cluster's dashboard, as http://127.0.0.1:8265, got {self.address!r}"
            )

    def ask(self, path: str) -> Any:
        """The JSON that the dashboard answers. Raises UserError where it refuses or does not answer; KeyError for a 404."""
        return json.loads(self._read(path))

    def _read(self, path: str, absent: Sequence[int] = (404,)) -> str:
        import requests

        headers = {"Authorization": f"Bearer {found}"} if (found := token()) else {}
        try:
            answer = requests.get(self.address + path, headers=headers, timeout=TIMEOUT_SECONDS, allow_redirects=False)
        except requests.RequestException as error:
            raise UserError(
                f"--address {self.address}: no Ray dashboard answers there ({type(error).__name__}); "
                "is the cluster up, and its dashboard's port forwarded?"
            ) from error
        if answer.status_code in (401, 403):
            raise UserError(
                f"--address {self.address} refuses {'this' if found else 'a request without a'} token; "
                "name the cluster's in RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN"
            )
        if answer.status_code in absent:
            raise KeyError(path)
        if not answer.ok:
            raise UserError(f"--address {self.address}{path} answered {answer.status_code}: {answer.text[:300]}")
        answer.encoding = answer.encoding if "charset" in answer.headers.get("Content-Type", "") else "utf-8"
        return answer.text

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[dict[str, Any]]:
        """The cluster's jobs that are runs of rlalign, newest first."""
        found = [j for j in self.ask("/api/jobs/") if (j.get("metadata") or {}).get("rlalign")]
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
                f"there is no job {name!r} at {self.address}; {nearest(name, known) if known else 'there are no runs'}"
            ) from error

    def logs(self, name: str) -> str:
        """What the job has printed so far, all of it."""
        return self.ask(f"/api/jobs/{name}/logs")["logs"] or ""

    def tail(self, job: Mapping[str, Any], lines: int) -> str:
        """The last lines that a job has printed; "" where there are none yet. Nothing else of its log is read."""
        if not job.get("driver_node_id"):
            return ""  # it has not started
        where = f"node_id={job['driver_node_id']}&submission_id={job['submission_id']}"
        try:
            return self._read(f"/api/v0/logs/file?{where}&lines={lines}", absent=(404, 500))
        except KeyError:  # the log has no file yet
            return ""

    def progress(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """How far a run has come, from the end of its log; further back only where that tells of no round."""
        found: dict[str, Any] = {}
        for lines in TAIL_LINES:
            text = self.tail(job, lines)
            found = progress_of(text)
            if found or text.count("\n") < lines:
                break
        return found

    def follow(self, name: str, say: Callable[[str], None]) -> None:
        """Says what the job prints, piece by piece as Ray sends it, until the job is over."""
        client = self._client()
        from aiohttp import ClientError

        async def each() -> None:
            async for piece in client.tail_job_logs(name):
                say(piece)

        try:
            asyncio.run(each())
        except (ClientError, RuntimeError) as error:
            raise UserError(
                f"--address {self.address} tells no more of what job {name} says ({error}); ask again: rlalign logs -f {name}"
            ) from error

    def _client(self) -> JobSubmissionClient:
        from rlalign.runtime.cluster import prepare_environment

        prepare_environment(self.address)
        self.ask("/api/version")
        from ray.job_submission import JobSubmissionClient

        for noisy in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(noisy).setLevel(logging.ERROR)  # they tell how they pack
        headers = {"Authorization": f"Bearer {found}"} if (found := token()) else None
        return JobSubmissionClient(self.address, headers=headers)

    def submit(
        self, entrypoint: str, metadata: Mapping[str, str], *, name: str = "", folder: Path | None = None
    ) -> str:
        """Hands a command to Ray Jobs and returns its id. ``folder`` becomes its working directory."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                return self._client().submit_job(
                    entrypoint=entrypoint,
                    submission_id=name or None,
                    metadata=dict(metadata),
                    runtime_env={"working_dir": str(folder)} if folder else None,
                )
            except (RuntimeError, ConnectionError, ValueError) as error:
                said = str(error).strip().splitlines() or [""]
                if "No available agent" in str(error) and time.monotonic() < deadline:
                    time.sleep(1.0)  # the head has only just started
                    continue
                raise UserError(f"--address {self.address} did not take the job: {said[-1]}") from error

    def workers(self, job: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """Role -> state -> actors, of a job's driver."""
        driver = (job.get("driver_info") or {}).get("id")
        if not driver:
            return {}
        query = f"/api/v0/actors?limit=1000&filter_keys=job_id&filter_predicates=%3D&filter_values={driver}"
        found: dict[str, dict[str, int]] = {}
        for actor in self.ask(query)["data"]["result"]["result"]:
            role = _ACTOR.fullmatch(actor.get("name") or "")
            if role and actor["state"] != "DEAD":
                states = found.setdefault(role.group(1), {})
                states[actor["state"]] = states.get(actor["state"], 0) + 1
        return found


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
    from rlalign.runtime.pack import pack

    name = _job_name(name, settings["name"])
    folder = out or f"~/rlalign-runs/{name}"
    with tempfile.TemporaryDirectory() as scratch:
        packed = pack(text, dict(settings), Path(scratch))
        command = f"python -m rlalign train run.yaml --address auto --out {_there(folder)}"
        metadata = {"rlalign": __version__, "run": settings["name"], "folder": folder}
        job = cluster.submit(command, metadata, name=name, folder=Path(scratch))
    return job, folder, packed


def resume_run(cluster: Cluster, folder: str, settings: Any, *, name: str, more: Sequence[str] = ()) -> str:
    """Submits the rest of a run whose folder is on the cluster, with the plug-ins of ``settings``. Returns the job's id."""
    from rlalign import __version__
    from rlalign.runtime.pack import pack

    name = _job_name(name, Path(folder).name)
    command = f"python -m rlalign train --resume {_there(folder)} --address auto {shlex.join(more)}".strip()
    metadata = {"rlalign": __version__, "run": Path(folder).name, "folder": folder}
    with tempfile.TemporaryDirectory() as scratch:
        pack("# the run folder has its own\n", settings, Path(scratch))
        return cluster.submit(command, metadata, name=name, folder=Path(scratch))


def run_there(cluster: Cluster, job: Mapping[str, Any], command: Sequence[str]) -> tuple[bool, str]:
    """Runs ``rlalign COMMAND FOLDER ...`` on the cluster's head, for a run that is a job. Returns (success, output)."""
    folder = (job.get("metadata") or {}).get("folder", "")
    if not folder:
        raise UserError(f"job {job['submission_id']} is no run that rlalign submitted; it has no run folder")
    verb, *rest = command
    there = f"python -m rlalign {shlex.quote(verb)} {_there(folder)} {shlex.join(rest)}"
    helper = cluster.submit(there, {"helper": verb})
    while (status := cluster.job(helper)["status"]) not in OVER:
        time.sleep(0.5)
    output = cluster.logs(helper).partition("Running entrypoint")[2].partition("\n")[2]  # what comes before is Ray's
    return status == "SUCCEEDED", output


def progress_of(log: str) -> dict[str, Any]:
    """Round, rounds, reward, seconds a round and the time that is left, read off the lines of a job's log."""
    rounds = _ROUND.findall(log)
    if not rounds:
        return {}
    done, of, reward, _ = rounds[-1]
    seconds = statistics.median(float(r[3]) for r in rounds[-10:])
    found: dict[str, Any] = {"round": int(done), "rounds": int(of), "seconds_per_round": seconds}
    found["eta_seconds"] = (int(of) - int(done)) * seconds
    return found | ({"reward": float(reward)} if reward else {})
