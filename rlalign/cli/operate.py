"""``rlalign submit | status | logs | stop | scale``, and ``rlalign list jobs``: runs that are under way, here or on a cluster.

RUN is a run folder, or with ``--address`` the id of a job. What a folder can be asked directly is asked through its files;
on a cluster the same command runs as a small job on the head, where the folder is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli.columns import say
from rlalign.registry import UserError, nearest

if TYPE_CHECKING:
    from rlalign.runtime.jobs import Cluster

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or with --address a job's id.")]
Address = Annotated[
    str,
    typer.Option(
        metavar="URL", help="The cluster's dashboard, as http://127.0.0.1:8265; RAY_API_SERVER_ADDRESS when left out."
    ),
]
WORKER_STATES = {"ALIVE": "ready", "PENDING_CREATION": "starting", "DEPENDENCIES_UNREADY": "starting"}
WORKER_STATES |= {"RESTARTING": "lost"}


def submit(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A run file, and settings that override it. With --resume only its plug-ins count, and rounds=N.",
        ),
    ] = None,
    address: Address = "",
    resume: Annotated[
        str, typer.Option(metavar="DIR", help="Go on with this run folder, named as the cluster sees it.")
    ] = "",
    out: Annotated[
        str, typer.Option(metavar="DIR", help="The run folder as the cluster sees it; ~/rlalign-runs/ID when left out.")
    ] = "",
    name: Annotated[str, typer.Option("--id", metavar="ID", help="The job's id; name and time when left out.")] = "",
) -> None:
    """Run a run file as a Ray job on a cluster.

    Sends the resolved run file and the plug-ins of yours that it names; data, weights and rlalign itself must be there.
    """
    from rlalign.config import dump, load_run, resolved
    from rlalign.runtime.jobs import Cluster, resume_run, submit_run

    cluster, arguments = Cluster(address), config or []
    if resume:
        files, more = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
        if out or len(files) > 1 or any(not a.startswith("rounds=") for a in more):
            raise UserError("--resume goes on under the run folder's own config.yaml: no --out, and rounds=N at most")
        plugins = resolved(load_run(files[0], [])) if files else {}
        job = resume_run(cluster, resume, plugins, name=name, more=more)
        print(f"job {job}: goes on with {resume} on {cluster.address}")
    else:
        if not arguments or "=" in arguments[0]:
            raise UserError("submit needs a run file, as in: rlalign submit configs/quickstart.yaml; or --resume DIR")
        run = load_run(arguments[0], arguments[1:])
        job, folder, packed = submit_run(cluster, dump(run), resolved(run), name=name, out=out)
        print(f"job {job}: {run.name} on {cluster.address}, with {', '.join(packed)}\nrun folder there: {folder}")
    print(f"watch it: rlalign status {job} --address {cluster.address}")
    print(f"      or: {cluster.address}/#/jobs/{job}")


def status(run: RunName, address: Address = "") -> None:
    """Say how a run stands: round, reward, workers, time left."""
    from rlalign.control import status_of

    folder = _folder(run, address)
    if folder is not None:
        _say_folder(status_of(folder))
        return
    cluster = _cluster(address)
    job = cluster.job(run)
    progress = cluster.progress(job)
    workers = cluster.workers(job) if job["status"] == "RUNNING" else {}
    rows = {"job": f"{run}: {job['status'].lower()}" + (f" ({job['message']})" if job["status"] == "FAILED" else "")}
    rows["run folder"] = (job.get("metadata") or {}).get("folder", "")
    rows |= _progress(progress, over=job["status"] != "RUNNING")
    for role, states in sorted(workers.items()):
        rows[role] = ", ".join(f"{n} {WORKER_STATES.get(s, s.lower())}" for s, n in sorted(states.items()))
    say(rows)


def _say_folder(found: Mapping[str, Any]) -> None:
    rows = {"run": f"{found['name']}: {found['state']}" + (f", job {found['job']}" if found.get("job") else "")}
    rows |= _progress(found, over=found["state"] not in ("starting", "running", "stopping"))
    for role, pool in found.get("pools", {}).items():
        states = ", ".join(f"{pool[s]} {s}" for s in ("ready", "starting", "lost") if pool[s] or s == "ready")
        restarts = f", {pool['restarts']} restarts" if pool["restarts"] else ""
        rows[f"{role} workers"] = f"{states} of {pool['wanted']}, {pool['busy']} busy{restarts}"
    if "queue" in found:
        rows["queue"] = f"{found['queue']} units under way"
    if found.get("dashboard"):
        rows["Ray dashboard"] = found["dashboard"]
    rows["said"] = f"{time.time() - found['updated']:.0f} s ago by process {found['process']} on {found['host']}"
    say(rows)


def _progress(found: Mapping[str, Any], *, over: bool) -> dict[str, str]:
    if not found.get("round"):
        return {"round": "none done yet"}
    rows = {"round": f"{found['round']} of {found['rounds']}"}
    if "reward" in found:
        rows["reward"] = f"{found['reward']:.4f}"
    rows["seconds a round"] = f"{found['seconds_per_round']:.1f}"
    if not over:
        rows["time left"] = _clock(found["eta_seconds"])
    return rows


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s" if minutes else f"{left} s"


def logs(
    run: Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until it ends.")] = False,
    address: Address = "",
) -> None:
    """Print what a job has said. (A run folder has metrics.jsonl.)"""
    cluster = _cluster(address)
    cluster.job(run)
    if not follow:
        print(cluster.logs(run), end="")
        return
    cluster.follow(run, lambda piece: print(piece, end="", flush=True))


def stop(
    run: RunName,
    address: Address = "",
    wait: Annotated[bool, typer.Option(help="Wait until it has stopped.")] = True,
) -> None:
    """Stop a run with a checkpoint, to be resumed: what is in flight is finished first."""
    from rlalign.control import OVER, ask, status_of

    folder = _folder(run, address)
    if folder is None:
        _there(run, address, ["stop", *([] if wait else ["--no-wait"])])
        return
    found = status_of(folder)
    if found["state"] in (*OVER, "lost"):
        raise UserError(f"{folder} is not running: its state is {found['state']!r}")
    ask(folder, stop=True)
    print(f"asked {folder} to stop after the rounds in flight")
    while wait and (found := status_of(folder))["state"] not in (*OVER, "lost"):
        time.sleep(0.2)
    if wait:
        print(f"{folder}: {found['state']} after round {found['round']}; go on with: rlalign train --resume {folder}")


def scale(
    run: RunName,
    rollout: Annotated[int | None, typer.Option(metavar="N", help="Rollout workers.", show_default=False)] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME=M", help="Workers of a reward.", show_default=False)
    ] = None,
    address: Address = "",
) -> None:
    """Change the number of workers of a run while it works. The result does not change."""
    from rlalign.control import OVER, ask, asked, status_of

    if rollout is None and not reward:
        raise UserError("scale needs --rollout N or --reward NAME=M")
    if rollout is not None and rollout < 1:
        raise UserError(f"--rollout must be >= 1, got {rollout}")
    wanted = dict(_reward_count(text) for text in reward or [])
    folder = _folder(run, address)
    if folder is None:
        counts = [f"--reward={title}={count}" for title, count in wanted.items()]
        _there(run, address, ["scale", *([f"--rollout={rollout}"] if rollout is not None else []), *counts])
        return
    found = status_of(folder)
    if found["state"] in (*OVER, "lost"):
        raise UserError(f"{folder} is not running: its state is {found['state']!r}")
    if "pools" not in found:
        raise UserError(f"{folder} has no workers to scale (yet): it runs with --local, or has only just started")
    titles = [role.removeprefix("reward ") for role in found["pools"] if role != "rollout"]
    for title in wanted:
        if title not in titles:
            raise UserError(f"--reward {title}: the run has no such reward; {nearest(title, titles)}")
    changes = {"rollout_workers": rollout} if rollout is not None else {}
    ask(folder, **changes, reward_workers={**asked(folder).reward_workers, **wanted})
    said = [f"{rollout} rollout"] if rollout is not None else []
    print(f"asked {folder} for {', '.join([*said, *(f'{n} {t}' for t, n in wanted.items())])} workers")


def list_jobs(address: str) -> None:
    """One line per run that is a job of the cluster."""
    cluster = _cluster(address)
    rows = [("job", "state", "started", "run folder")]
    for job in cluster.jobs():
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.get("start_time") or 0) / 1000))
        rows.append((job["submission_id"], job["status"].lower(), started, job["metadata"].get("folder", "")))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _reward_count(text: str) -> tuple[str, int]:
    title, _, count = text.rpartition("=")
    if not title or not count.isdigit() or int(count) < 1:
        raise UserError(f"--reward must read NAME=M with M >= 1, got {text!r}")
    return title, int(count)


def _folder(run: str, address: str) -> Path | None:
    """The run folder that RUN means; None where it means a job."""
    folder = Path(run)
    if address or (not folder.is_dir() and os.environ.get("RAY_API_SERVER_ADDRESS")):
        return None
    if not folder.is_dir():
        raise UserError(f"{run!r} is no run folder here; for a job of a cluster add --address URL")
    return folder


def _cluster(address: str) -> Cluster:
    from rlalign.runtime.jobs import Cluster

    return Cluster(address)


def _there(run: str, address: str, command: list[str]) -> None:
    from rlalign.runtime.jobs import run_there

    cluster = _cluster(address)
    done, output = run_there(cluster, cluster.job(run), command)
    print(output, end="" if output.endswith("\n") else "\n", file=sys.stdout if done else sys.stderr)
    if not done:
        raise typer.Exit(2)
