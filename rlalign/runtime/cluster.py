"""Starting a local Ray or joining a cluster, and refusing what cannot fit before anything starts."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from rlalign import devices
from rlalign.config import Run
from rlalign.http_token import is_loopback
from rlalign.registry import UserError
from rlalign.runtime import placement
from rlalign.sample import Sample


def prepare_environment(address: str | None) -> None:
    """Settings that Ray reads when it is imported. A value that the user has set stays."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # would ship the working directory
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # how soon a dead learner is noticed; polling takes its time
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less; a lost node is noticed by its actors
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # today's default of the next release; silences a warning
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a run file keep their meaning
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the end is an error, and not the start of another Ray
    }
    if address is None or _on_loopback_only(address):
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a local Ray listens on loopback only
    if address is not None and _has_token():
        settings["RAY_AUTH_MODE"] = "token"  # an explicit address never turns it on by itself
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _on_loopback_only(address: str) -> bool:
    """Whether ``127.0.0.1:PORT`` is a head that keeps to loopback; Ray takes it for this machine's other address otherwise."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not is_loopback(host):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks which of our addresses would
            own = probe.getsockname()[0]
        except OSError:
            return True  # there is no other address
    try:
        socket.create_connection((own, int(port)), timeout=1.0).close()
    except OSError:
        return True
    return False


def _has_token() -> bool:
    return bool(
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").is_file()
    )


def connect(run: Run | Sample, address: str | None) -> str:
    """Starts or joins Ray and returns the dashboard's URL ("" when there is none).

    A local Ray gets as many logical CPUs as the run reserves: they are places, not cores. Its GPUs are those of the machine.
    Resources that are missing, or on a cluster taken, are a UserError that says which.
    """
    refuse_device(run)
    prepare_environment(address)
    context = _started(run) if address is None else _joined(run, address)
    url = context.dashboard_url
    return f"http://{url}" if url else ""


def _started(run: Run | Sample) -> Any:
    here = placement.this_machine(run, devices.gpus())
    refuse_what_is_not_here(run, here)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray.init(
        address="local",
        num_cpus=int(here.total["CPU"]),
        num_gpus=int(here.total["GPU"]),
        resources=placement.custom(run),
        labels=dict(here.labels),
        include_dashboard=_dashboard_installed(),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _joined(run: Run | Sample, address: str) -> Any:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    refuse_what_does_not_answer(address)
    try:
        context: Any = ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--address {address}: cannot join a Ray cluster there ({reason}); is it started?") from error
    try:
        refuse_what_cannot_fit(run, address)
    except UserError:
        leave()
        raise
    return context


def leave() -> None:
    """Leaves the cluster that ``connect`` has joined."""
    import ray

    ray.shutdown()


def refuse_what_does_not_answer(address: str) -> None:
    """Raises UserError when nothing listens at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not host or not port.isdigit():
        raise UserError(f"--address must be HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}); is it started?"
        ) from error


def refuse_device(run: Run | Sample) -> None:
    """Raises UserError where Ray could not give the run's policies the device that they are to compute on."""
    runtime = run.runtime
    if runtime.device == "cpu":
        return
    if runtime.device != "cuda":
        raise UserError(
            f"runtime.device must be cpu or cuda on Ray, which chooses every worker's GPU, got {runtime.device}; "
            "leave the number out, or run with --local"
        )
    reserved = {"rollout": runtime.rollout_gpus} | ({"learner": runtime.learner_gpus} if isinstance(run, Run) else {})
    for role, gpus in reserved.items():
        if not gpus:
            raise UserError(
                f"runtime.{role}_gpus must be > 0 on Ray where runtime.device is cuda, got 0; "
                "a share of a GPU is enough, and --local needs none"
            )


def refuse_what_is_not_here(run: Run | Sample, here: placement.Node) -> None:
    """Raises UserError when this machine alone lacks what the run reserves: GPUs, or labels that no node can have together."""
    placement.refuse(placement.place(placement.bundles(run), [here]), [here], placement.HERE)


def refuse_what_cannot_fit(run: Run | Sample, address: str) -> None:
    """Raises UserError when the cluster lacks, or others hold, what the run reserves; its autoscaler's nodes count as there."""
    nodes = placement.cluster_nodes()
    placement.refuse(placement.place(placement.bundles(run), nodes), nodes, f"on the cluster at {address}")


def _dashboard_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("aiohttp") is not None
