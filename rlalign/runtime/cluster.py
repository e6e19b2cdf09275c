"""Starting a local Ray or joining a cluster, and refusing what cannot fit before anything starts."""

from __future__ import annotations

import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

from rlalign.config import Run
from rlalign.registry import UserError
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
    }
    if address is None:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a local Ray listens on loopback only
    elif _has_token():
        settings["RAY_AUTH_MODE"] = "token"  # an explicit address never turns it on by itself
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _has_token() -> bool:
    return bool(
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").is_file()
    )


def needed_cpus(run: Run | Sample) -> float:
    """CPUs that all actors and learners of a run reserve together."""
    runtime = run.runtime
    rewards = len(run.rewards_for("evaluate")) * runtime.reward_workers
    reads = isinstance(run, Run) and run.preferences is not None and run.preferences.reader == "ray"
    return (
        float(reads)  # Ray Data's tasks; without a CPU of their own they would wait for ever
        + runtime.rollout_workers * runtime.rollout_cpus
        + rewards * runtime.reward_cpus
        + (runtime.learner_workers * runtime.learner_cpus if isinstance(run, Run) else 0.0)
    )


def needed_gpus(run: Run | Sample) -> float:
    """GPUs that all actors and learners of a run reserve together."""
    runtime = run.runtime
    rewards = len(run.rewards_for("evaluate")) * runtime.reward_workers
    return (
        runtime.rollout_workers * runtime.rollout_gpus
        + rewards * runtime.reward_gpus
        + (runtime.learner_workers * runtime.learner_gpus if isinstance(run, Run) else 0.0)
    )


def connect(run: Run | Sample, address: str | None) -> str:
    """Starts or joins Ray and returns the dashboard's URL ("" when there is none).

    A local Ray gets as many logical CPUs as the run reserves: they are places, not cores. On a cluster, resources that are
    missing or taken are a UserError that says which.
    """
    prepare_environment(address)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if address is None:
        cpus = max(os.cpu_count() or 1, math.ceil(needed_cpus(run)))
        context: Any = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=_dashboard_installed(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        refuse_what_does_not_answer(address)
        try:
            context: Any = ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--address {address}: cannot join a Ray cluster there ({reason}); is it started?"
            ) from error
        refuse_what_cannot_fit(run, address)
    url = context.dashboard_url
    return f"http://{url}" if url else ""


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


def refuse_what_cannot_fit(run: Run | Sample, address: str) -> None:
    """Raises UserError when the cluster lacks, or others hold, what the run reserves."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for name, need in (("CPU", needed_cpus(run)), ("GPU", needed_gpus(run))):
        if need > total.get(name, 0.0):
            raise UserError(
                f"runtime: the run reserves {need:g} {name}s and the cluster at {address} has {total.get(name, 0.0):g}; "
                "lower runtime.rollout_workers, or add a node"
            )
        if need > free.get(name, 0.0) + 1e-6:
            raise UserError(
                f"runtime: the run reserves {need:g} {name}s and {free.get(name, 0.0):g} of {total[name]:g} are free at "
                f"{address}; "
                "wait for the other work to end, lower runtime.rollout_workers, or add a node"
            )


def _dashboard_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("aiohttp") is not None
