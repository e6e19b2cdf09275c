"""The driver of a run that is a Ray job shows its status.json to whoever asks the dashboard."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def job_id() -> str:
    """The submission id of the Ray job that this process is the driver of; "" where it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return (config.get("metadata") or {}).get("job_submission_id", "")


def status_name(job: str) -> str:
    """The file among Ray's logs, on the driver's node, that is a job's status.json."""
    return f"rlalign-{job}.json"


def publish_status(folder: Path, job: str) -> None:
    """Links a run folder's status.json into the folder of Ray's logs, out of which the dashboard
    reads. Ray must run. Where it cannot be linked, the job has no status."""
    from ray._private import worker  # Ray has no public way to the folder of its logs

    node = worker._global_node
    if node is None:
        return
    link = Path(node.get_logs_dir_path()) / status_name(job)
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(folder / "status.json")
