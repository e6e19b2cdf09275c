"""Where a Ray cluster is: what ``--address`` means, and whether a head answers there, before Ray
itself tries for minutes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from rlalign.core.registry import UserError
from rlalign.runtime.token import cluster_token

if TYPE_CHECKING:
    import grpc

ANSWER_SECONDS = 10.0
"""How long a head may take to answer."""
NODE_SECONDS = 10.0
"""How long the cluster's node on this machine, which may just be starting, may take to be there."""

QUESTION = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""A call that every head answers."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """A head's address, who said it, and what to do where nobody answers."""

    host_and_port: str
    place: str
    way_out: str


def find_address(text: str) -> Address:
    """The head that ``--address`` means: HOST:PORT, or for ``auto`` the one that is found.

    That is RAY_ADDRESS, else the head that the last ``ray start`` has noted in Ray's temporary
    folder, else that of a Ray node that runs on this machine. Raises UserError where there is none
    of them, several, or none that is HOST:PORT.
    """
    if text != "auto":
        return Address(
            host_and_port=_checked(text, "--address"),
            place=f"--address {text}",
            way_out="is it started?",
        )
    said = os.environ.get("RAY_ADDRESS", "").strip()
    if said and said != "auto":
        return Address(
            host_and_port=_checked(said, "--address auto takes RAY_ADDRESS, which"),
            place=f"--address auto, where RAY_ADDRESS says {said}",
            way_out="is it started? unset RAY_ADDRESS where it is of a head that is gone",
        )
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    note = Path(temporary) / "ray" / "ray_current_cluster"
    noted = _read_note(note)
    running = sorted(_arguments_of_nodes("--gcs-address="))
    if noted:
        others = [head for head in running if head != noted]
        there = f"; a node that runs here is of --address {others[0]}" if others else ""
        return Address(
            host_and_port=_checked(noted, f"--address auto reads {note}, which"),
            place=f"--address auto, where {note} says {noted}",
            way_out=(
                "that head is gone: start one with `ray start --head`, or leave --address"
                f" out{there}"
            ),
        )
    if len(running) == 1:
        return Address(
            host_and_port=_checked(running[0], "--address auto finds a Ray node, whose head"),
            place=f"--address auto, where a Ray node of this machine says {running[0]}",
            way_out="its head is gone: end the node with `ray stop`, or name another head",
        )
    if running:
        raise UserError(
            "--address auto: nodes of several clusters run here; name one with --address:"
            f" {', '.join(running)}"
        )
    raise UserError(
        "--address auto: RAY_ADDRESS is not set, no Ray node runs on this machine, and there is no"
        f" {note}; name the head with --address HOST:PORT, or leave --address out for a Ray of"
        " its own"
    )


def _checked(text: str, place: str) -> str:
    """``text`` where it is HOST:PORT, with the host of an IPv6 address in brackets; a UserError
    otherwise."""
    host, _, port = text.rpartition(":")
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_ipv6 = plain != host
    well_formed = plain and not set(plain) & set(" /[]") and (is_ipv6 or ":" not in plain)
    if not well_formed or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        hint = "; URLs are for submit, status and the like" if "://" in text else ""
        words = "HOST:PORT or auto" if place == "--address" else "HOST:PORT"
        raise UserError(f"{place} must be {words}, got {text!r}{hint}")
    return text


def _read_note(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _arguments_of_nodes(flag: str) -> set[str]:
    """The values of an argument of every raylet of this machine (its own arguments, and those it
    starts workers with)."""
    found: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if "raylet" in Path(command[0]).name:
            words = [word for argument in command for word in argument.split(" ")]
            found |= {word.removeprefix(flag) for word in words if word.startswith(flag)}
    return found - {"", "None"}


def auth_mode(address: Address) -> str:
    """What RAY_AUTH_MODE has to be for the head there: token or disabled. Raises UserError where no
    head answers.

    Ray reads that variable when it is imported, so this asks without Ray: as nobody, and through no
    proxy.
    """
    import grpc

    # over TLS only Ray itself can ask: the settings decide
    said = os.environ.get("RAY_AUTH_MODE", "").lower()
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return said or ("token" if cluster_token() else "disabled")

    # a head that takes no token answers the question
    channel = grpc.insecure_channel(address.host_and_port, options=[("grpc.enable_http_proxy", 0)])
    try:
        channel.unary_unary(QUESTION)(b"", timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        if _wants_token(error) and cluster_token() and said != "disabled":
            return "token"
        raise UserError(_explain(error, address)) from error
    finally:
        channel.close()

    # a token that nobody checks is a mistake of the settings
    if said == "token":
        raise UserError(
            f"{address.place}: RAY_AUTH_MODE is token, and the Ray head there asks for none; start"
            " it with RAY_AUTH_MODE=token too, or unset that"
        )
    return "disabled"


def refuse_where_this_is_no_node(address: Address) -> None:
    """Raises UserError where the head refuses the token, or where this machine is no node of its
    cluster."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_pb2, gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    # the head is asked directly, before this process joins Ray
    channel = create_gcs_channel(address.host_and_port)
    messages: Any = gcs_service_pb2  # made by protobuf, of which no type checker knows
    alive: Any = gcs_pb2
    question = messages.GetAllNodeInfoRequest(state_filter=alive.GcsNodeInfo.GcsNodeState.ALIVE)

    # a node that has only just started is not listed at once
    deadline = time.monotonic() + NODE_SECONDS
    try:
        while True:
            nodes = (
                NodeInfoGcsServiceStub(channel)
                .GetAllNodeInfo(question, timeout=ANSWER_SECONDS)
                .node_info_list
            )
            if {node.node_id.hex() for node in nodes} & _arguments_of_nodes("--node_id="):
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"{address.place}: a Ray head answers there, and this machine is no node of its"
                    f" cluster; join it with `ray start --address {address.host_and_port}`, or hand"
                    " the run to the cluster with rlalign submit"
                )
            time.sleep(0.5)
    except grpc.RpcError as error:
        raise UserError(_explain(error, address)) from error
    finally:
        channel.close()


def _wants_token(error: grpc.RpcError) -> bool:
    import grpc

    code = error.code()  # type: ignore[attr-defined]
    return code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def _explain(error: grpc.RpcError, address: Address) -> str:
    """Why the call failed, in a user's words."""
    import grpc

    code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
    details: str = error.details() or ""  # type: ignore[attr-defined]

    # a refused token is a reason of its own
    if _wants_token(error):
        return (
            f"{address.place}: the Ray cluster there refuses this token, or a request without one;"
            " name the cluster's in RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN, and let"
            " RAY_AUTH_MODE be token"
        )

    # every other failure is one of the connection
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        reason = f"no answer in {ANSWER_SECONDS:g} s"
    elif code != grpc.StatusCode.UNAVAILABLE or "HTTP/2" in details:
        return (
            f"{address.place}: what answers there is no Ray head; "
            "its port is 6379 where `ray start` was not told another, and 8265 is the dashboard's"
        )
    elif "resolving" in details:
        reason = "the host's name is not known"
    else:
        reason = details.rpartition(": ")[2] or code.name
    return f"{address.place}: no Ray cluster answers there ({reason}); {address.way_out}"
