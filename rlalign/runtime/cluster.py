"""Starting a local Ray or joining a cluster, and refusing what cannot fit before anything
starts."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil

from rlalign.core.registry import UserError, read_reason
from rlalign.networks import devices
from rlalign.runtime import placement
from rlalign.runtime.address import Address, auth_mode, find_address, refuse_where_this_is_no_node
from rlalign.runtime.placement import Bundle, Node
from rlalign.runtime.roles import LEARNER, ROLLOUT
from rlalign.runtime.temporary import short_tmpdir, temporary_folder
from rlalign.runtime.token import cluster_token, make_token
from rlalign.web.client import keep_from_proxies
from rlalign.web.token import is_loopback


def prepare_environment(address: str | None, auth_mode: str = "") -> None:
    """Settings that Ray reads when it is imported. A value that the user has set stays.

    ``auth_mode`` is what the head at ``address`` asks for, where that is known.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # would ship the working directory
        # how soon a dead learner is noticed; polling takes its time
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        # on a cluster rlalign.runtime.training.watch starts it, on the driver's node
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        # today's default of the next release; silences a warning
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a run file keep their meaning
        # a call after the end is an error, and not the start of another Ray
        "RAY_ENABLE_AUTO_CONNECT": "0",
    }

    # these two depend on where Ray runs
    if address is None or _on_loopback_only(address):
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a local Ray listens on loopback only
    if auth_mode or (address is not None and cluster_token()):
        # an explicit address never turns it on by itself
        settings["RAY_AUTH_MODE"] = auth_mode or "token"

    # what the user has set stays as it is
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    keep_from_proxies(*_plain_hosts(address))


def _plain_hosts(address: str | None) -> list[str]:
    """Hosts beside loopback that are asked unencrypted where an address is used: its own, and this
    machine as a node."""
    scheme, _, rest = (address or "").rpartition("://")
    host = urlsplit(f"//{rest}").hostname
    if not host or scheme == "https":
        return []
    interfaces = psutil.net_if_addrs().values()
    return [
        host,
        *(one.address for some in interfaces for one in some if one.family == socket.AF_INET),
    ]


def _on_loopback_only(address: str) -> bool:
    """Whether ``127.0.0.1:PORT`` is a head that keeps to loopback; Ray takes it for this machine's
    other address otherwise."""
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


def print_note(text: str) -> None:
    """Says something that is no error, where nobody else listens."""
    print(text, file=sys.stderr, flush=True)


def connect(
    bundles: Sequence[Bundle],
    device: str,
    address: str | None,
    say: Callable[[str], None] = print_note,
) -> str:
    """Starts or joins Ray for workers with these bundles, whose policies compute on ``device``.
    Returns the dashboard's URL ("" when there is none).

    A local Ray gets as many logical CPUs as the bundles reserve: they are places, not cores. Its
    GPUs are those of the machine. Resources that are missing, or on a cluster taken, are a
    UserError that says which. Notes go to ``say``.
    """
    refuse_device(device, bundles)

    # a Ray of our own gets what this machine has
    if address is None:
        here = placement.this_machine(bundles, devices.gpus())
        refuse_what_is_not_here(bundles, here)
        context = start_ray(
            say,
            num_cpus=int(here.total["CPU"]),
            num_gpus=int(here.total["GPU"]),
            resources=placement.custom(bundles),
            labels=dict(here.labels),
            include_dashboard=_dashboard_installed(),
        )
    else:
        context = join_ray(address)
        try:
            refuse_what_cannot_fit(bundles, address, say)
        except UserError:
            leave()
            raise

    # the dashboard may not be installed
    url = context.dashboard_url
    return f"http://{url}" if url else ""


def start_ray(say: Callable[[str], None], **settings: Any) -> Any:
    """Starts a Ray of this process. Raises UserError, naming RAY_TMPDIR, where it cannot keep its
    files or does not start."""
    prepare_environment(None)
    folder = temporary_folder(say)
    make_token()
    import ray

    # Ray's own messages go to its log files
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with short_tmpdir(folder):
            return ray.init(
                address="local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "ray"),
                **settings,
            )
    except (TypeError, ValueError):
        raise  # of the arguments, which are ours
    except Exception as error:
        reason = read_reason(error, -1).strip()
        raise UserError(
            f"Ray does not start on this machine ({reason}); it keeps its files in {folder}/ray,"
            " and logs in session_latest/logs there: does that folder have room? RAY_TMPDIR names"
            " another"
        ) from error


def answering(address: str) -> Address:
    """The head that ``--address`` means. Raises UserError, soon, where none answers."""
    found = find_address(address)
    prepare_environment(found.host_and_port, auth_mode(found))
    refuse_where_this_is_no_node(found)
    return found


def join_ray(address: str) -> Any:
    """Joins the cluster that ``--address`` means. Raises UserError where that cannot be."""
    found = answering(address)
    import ray
    from ray.exceptions import RayError

    # Ray's own messages go to its log files
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        return ray.init(
            address=found.host_and_port,
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = read_reason(error)
        raise UserError(
            f"{found.place}: cannot join the Ray cluster there ({reason}); {found.way_out}"
        ) from error


def leave() -> None:
    """Leaves the cluster that ``connect`` has joined."""
    import ray

    ray.shutdown()


def refuse_device(device: str, bundles: Iterable[Bundle]) -> None:
    """Raises UserError where Ray could not give the policies the device that they are to compute
    on."""
    if device == "cpu":
        return
    if device != "cuda":
        raise UserError(
            "runtime.device must be cpu or cuda on Ray, which chooses every worker's GPU, got"
            f" {device}; leave the number out, or run with --local"
        )
    without = {bundle.role for bundle in bundles if not bundle.needs.get("GPU")}
    for role in (ROLLOUT, LEARNER):
        if role in without:
            raise UserError(
                f"runtime.{role}.gpus must be > 0 on Ray where runtime.device is cuda, got 0; "
                "a share of a GPU is enough, and --local needs none"
            )


def refuse_what_is_not_here(bundles: Iterable[Bundle], here: Node) -> None:
    """Raises UserError when this machine alone lacks what is reserved: GPUs, or labels that no
    node can have together."""
    placement.refuse(placement.place(bundles, [here]), [here], placement.HERE)


def refuse_what_cannot_fit(
    bundles: Iterable[Bundle], address: str, say: Callable[[str], None] = print_note
) -> None:
    """Raises UserError when the cluster lacks, or others hold, what is reserved; its autoscaler's
    nodes count as there. Where there is one that does not say what it may add, that is a note."""
    nodes = placement.cluster_nodes()
    left = placement.place(bundles, nodes)
    try:
        placement.refuse(left, nodes, f"on the cluster at {address}")
    except UserError as error:
        if not placement.has_autoscaler():
            raise
        say(f"{error}; the cluster's autoscaler may add one, and is waited for")


def _dashboard_installed() -> bool:
    import importlib.util

    return importlib.util.find_spec("aiohttp") is not None
