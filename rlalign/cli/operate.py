"""``rlalign submit | status | logs | stop | scale``, and ``rlalign list jobs``: runs that are under
way, here or on a cluster.

RUN is a run folder or the URL of one, or with ``--address`` the id of a job. What a folder can be
asked directly is asked through its files; on a cluster the same command runs as a small job on the
head, where the folder is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli.common import print_columns
from rlalign.cli.standing import folder_rows, node_rows, pool_rows, progress_rows
from rlalign.core.registry import UserError, nearest
from rlalign.storage import (
    Place,
    check_url,
    find_place,
    is_url,
    look_at,
    name_of,
    refresh,
    send,
)

if TYPE_CHECKING:
    from rlalign.runtime.jobs.runs import Cluster

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder or the URL of one, or with --address a job's id."
    ),
]
Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help=(
            "The cluster's dashboard, as http://127.0.0.1:8265; RAY_API_SERVER_ADDRESS when left"
            " out."
        ),
    ),
]


def submit(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help=(
                "A run file, and settings that override it. With --resume only its plug-ins count."
            ),
        ),
    ] = None,
    address: Address = "",
    resume: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Go on with this run folder, named as the cluster sees it, or URL."
        ),
    ] = "",
    out: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help=(
                "The run folder as the cluster sees it, or a URL as s3://bucket/runs/ID;"
                " ~/rlalign-runs/ID when left out."
            ),
        ),
    ] = "",
    name: Annotated[
        str, typer.Option("--id", metavar="ID", help="The job's id; name and time when left out.")
    ] = "",
) -> None:
    """Run a run file as a Ray job on a cluster.

    Sends the resolved run file and the plug-ins of yours that it names; data, weights and rlalign
    itself must be there.
    """
    from rlalign.runtime.jobs.runs import Cluster

    for option, place in (("--resume", resume), ("--out", out)):
        if is_url(place):
            check_url(place, option)
    cluster = Cluster(address)
    arguments = config or []
    if resume:
        job = _submit_rest(cluster, resume, arguments, name=name, out=out)
    else:
        job = _submit_new(cluster, arguments, name=name, out=out)
    print(f"watch it: rlalign status {job} --address {cluster.address}")
    print(f"      or: {cluster.address}/#/jobs/{job}")


def _submit_rest(
    cluster: Cluster, folder: str, arguments: Sequence[str], *, name: str, out: str
) -> str:
    """Submits the rest of the run in a folder of the cluster's; returns the job's id."""
    from rlalign.config import load_run, refuse_fixed, resolved
    from rlalign.runtime.jobs.runs import resume_run

    files = [argument for argument in arguments if "=" not in argument]
    more = [argument for argument in arguments if "=" in argument]
    if out or len(files) > 1:
        raise UserError(
            "--resume goes on under the run folder's own config.yaml: no --out, and one run file at"
            " most"
        )
    refuse_fixed(more)
    plugins = resolved(load_run(files[0], [])) if files else {}
    job = resume_run(cluster, folder, plugins, name=name, more=more)
    print(f"job {job}: goes on with {folder} on {cluster.address}")
    return job


def _submit_new(cluster: Cluster, arguments: Sequence[str], *, name: str, out: str) -> str:
    """Submits a run file under its overrides; returns the job's id."""
    from rlalign.config import dump, load_run, locate_run, resolved
    from rlalign.runtime.jobs.runs import submit_run

    if not arguments or "=" in arguments[0]:
        raise UserError(
            "submit needs a run file, as in: rlalign submit configs/quickstart.yaml; or"
            " --resume DIR"
        )
    run = locate_run(load_run(arguments[0], arguments[1:]), begun=False, here=False)
    job, folder, packed = submit_run(cluster, dump(run), resolved(run), name=name, out=out)
    print(
        f"job {job}: {run.name} on {cluster.address}, with {', '.join(packed)}\nrun folder there:"
        f" {folder}"
    )
    return job


def status(run: RunName, address: Address = "") -> None:
    """Say how a run stands: round, reward, workers, time left."""
    from rlalign.alignment.control import status_of

    place = _find_folder(run, address)
    if place is not None:
        with look_at(place) as folder:
            print_columns(folder_rows(status_of(folder)))
        return
    cluster = _cluster(address)
    job = cluster.job(run)
    is_running = job["status"] == "RUNNING"
    message = f" ({job['message']})" if job["status"] == "FAILED" else ""
    found = cluster.standing(job)
    rows = {
        "job": f"{run}: {job['status'].lower()}{message}",
        "run folder": (job.get("metadata") or {}).get("folder", ""),
        **progress_rows(found, over=not is_running),
    }
    rows |= pool_rows(found) if is_running else {}
    print_columns(rows | node_rows(found, over=not is_running))


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
    from rlalign.alignment.control import OVER, ask, status_of

    place = _find_folder(run, address)
    if place is None:
        _there(run, address, ["stop", *([] if wait else ["--no-wait"])])
        return
    # ask, and wait until it says that it has
    with look_at(place) as folder:
        name = name_of(folder)
        found = _status_of_running(folder)
        ask(folder, stop=True)
        send(folder, "control.json")
        print(f"asked {name} to stop after the rounds in flight")
        while wait and (found := status_of(folder))["state"] not in (*OVER, "lost"):
            time.sleep(2.0 if is_url(place) else 0.2)
            refresh(folder)
    if wait:
        print(
            f"{name}: {found['state']} after round {found['round']}; go on with: rlalign train"
            f" --resume {name}"
        )


def scale(
    run: RunName,
    rollout: Annotated[
        int | None, typer.Option(metavar="N", help="Rollout workers.", show_default=False)
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=M", help="Workers of a reward.", show_default=False),
    ] = None,
    address: Address = "",
) -> None:
    """Change the number of workers of a run while it works. The result does not change."""
    from rlalign.alignment.control import ask, asked

    if rollout is None and not reward:
        raise UserError("scale needs --rollout N or --reward NAME=M")
    if rollout is not None and rollout < 1:
        raise UserError(f"--rollout must be >= 1, got {rollout}")
    wanted = dict(_reward_count(text) for text in reward or [])
    place = _find_folder(run, address)
    if place is None:
        # the same command, on the cluster
        counts = [f"--rollout={rollout}"] if rollout is not None else []
        counts += [f"--reward={title}={count}" for title, count in wanted.items()]
        _there(run, address, ["scale", *counts])
        return
    said = [f"{rollout} rollout"] if rollout is not None else []
    said += [f"{count} {title}" for title, count in wanted.items()]
    changes = {"rollout_workers": rollout} if rollout is not None else {}
    with look_at(place) as folder:
        _refuse_unknown_rewards(folder, wanted)
        ask(folder, **changes, reward_workers={**asked(folder).reward_workers, **wanted})
        send(folder, "control.json")
        print(f"asked {name_of(folder)} for {', '.join(said)} workers")


def _status_of_running(folder: Path) -> dict[str, Any]:
    """What status.json says of a run. Raises UserError where it does not run."""
    from rlalign.alignment.control import OVER, status_of

    found = status_of(folder)
    if found["state"] in (*OVER, "lost"):
        raise UserError(f"{name_of(folder)} is not running: its state is {found['state']!r}")
    return found


def _refuse_unknown_rewards(folder: Path, wanted: Mapping[str, int]) -> None:
    """Raises UserError for a reward that the run does not have, and a run without workers."""
    found = _status_of_running(folder)
    if "pools" not in found:
        raise UserError(
            f"{name_of(folder)} has no workers to scale (yet): it runs with --local, or has only"
            " just started"
        )
    titles = [pool["reward"] for pool in found["pools"].values() if pool["reward"]]
    for title in wanted:
        if title not in titles:
            raise UserError(
                f"--reward {title}: the run has no such reward; {nearest(title, titles)}"
            )


def list_jobs(address: str) -> None:
    """One line per run that is a job of the cluster."""
    rows = [("job", "state", "started", "run folder")]
    for job in _cluster(address).jobs():
        began = time.localtime((job.get("start_time") or 0) / 1000)
        started = time.strftime("%Y-%m-%d %H:%M", began)
        folder = job["metadata"].get("folder", "")
        rows.append((job["submission_id"], job["status"].lower(), started, folder))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _reward_count(text: str) -> tuple[str, int]:
    title, _, count = text.rpartition("=")
    if not title or not count.isdigit() or int(count) < 1:
        raise UserError(f"--reward must read NAME=M with M >= 1, got {text!r}")
    return title, int(count)


def _find_folder(run: str, address: str) -> Place | None:
    """The run folder, or its URL, that RUN means; None where it means a job."""
    if is_url(run) and not address:
        return find_place(run)
    folder = Path(run)
    if address or (not folder.is_dir() and os.environ.get("RAY_API_SERVER_ADDRESS")):
        return None
    if not folder.is_dir():
        raise UserError(f"{run!r} is no run folder here; for a job of a cluster add --address URL")
    return folder


def _cluster(address: str) -> Cluster:
    from rlalign.runtime.jobs.runs import Cluster

    return Cluster(address)


def _there(run: str, address: str, command: list[str]) -> None:
    from rlalign.runtime.jobs.runs import run_there

    cluster = _cluster(address)
    done, output = run_there(cluster, cluster.job(run), command)
    stream = sys.stdout if done else sys.stderr
    print(output, end="" if output.endswith("\n") else "\n", file=stream)
    if not done:
        raise typer.Exit(2)
