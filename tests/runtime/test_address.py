"""Where --address leads, and what is said where no Ray head answers, by real servers of other
kinds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from rlalign.cli import main
from rlalign.core.registry import UserError
from rlalign.runtime import address, cluster
from tests.runs import CONFIGS


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is named or noted, and none runs here, whatever else this machine does."""
    for name in ("RAY_ADDRESS", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(address, "_arguments_of_nodes", lambda flag: set())
    monkeypatch.setattr(address, "ANSWER_SECONDS", 3.0)
    monkeypatch.setattr(address, "NODE_SECONDS", 0.1)


def note(folder: Path, text: str) -> Path:
    """What ``ray start`` leaves behind."""
    (folder / "ray").mkdir(exist_ok=True)
    (folder / "ray" / "ray_current_cluster").write_text(text)
    return folder / "ray" / "ray_current_cluster"


def found(text: str) -> str:
    return address.find_address(text).host_and_port


def test_auto_is_the_environments_then_the_noted_then_the_running_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match="no Ray node runs on this machine, and there is no .*/ray/ray_current_cluster; name",
    ):
        found("auto")
    monkeypatch.setattr(address, "_arguments_of_nodes", lambda flag: {"10.0.0.1:6379"})
    assert found("auto") == "10.0.0.1:6379"
    note(tmp_path, "10.0.0.2:6379\n")
    assert found("auto") == "10.0.0.2:6379"
    assert "of --address 10.0.0.1:6379" in address.find_address("auto").way_out
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert found("auto") == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", " 10.0.0.3:6379 ")
    assert found("auto") == "10.0.0.3:6379"
    assert found("10.0.0.4:6379") == "10.0.0.4:6379"


def test_auto_does_not_choose_among_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        address, "_arguments_of_nodes", lambda flag: {"10.0.0.1:6379", "10.0.0.2:6379"}
    )
    with pytest.raises(
        UserError,
        match=r"several clusters run here; name one with --address: 10\.0\.0\.1:6379, 10\.0\.0\.2",
    ):
        found("auto")


def test_the_note_lies_where_ray_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "job"))
    (tmp_path / "job").mkdir()
    note(tmp_path / "job", "10.0.0.5:6379")
    assert found("auto") == "10.0.0.5:6379"


@pytest.mark.parametrize(
    "text", ["127.0.0.1:6379", "head:1", "[::1]:6379", "head.example.org:65535"]
)
def test_addresses_that_may_be(text: str) -> None:
    assert found(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "head",
        "head:",
        ":6379",
        "head:0",
        "head:65536",
        "head:six",
        "::1:6379",
        "a b:6379",
        "local",
        "ray://head:10001",
    ],
)
def test_addresses_that_may_not_be(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--address must be HOST:PORT or auto, got"):
        found(text)
    if text:
        monkeypatch.setenv("RAY_ADDRESS", text)
        with pytest.raises(
            UserError, match="--address auto takes RAY_ADDRESS, which must be HOST:PORT, got"
        ):
            found("auto")


def test_a_dashboards_url_is_for_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(
        UserError,
        match="RAY_ADDRESS, which must be HOST:PORT, .*; URLs are for submit, status and the like",
    ):
        found("auto")


# --- who answers ---------------------------------------------------------------------------------


def free_port(closing: ExitStack) -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def silent(closing: ExitStack) -> int:
    """Takes a connection and says nothing, ever."""
    one = closing.enter_context(socket.socket())
    one.bind(("127.0.0.1", 0))
    one.listen(16)
    return one.getsockname()[1]


def hanging_up(closing: ExitStack) -> int:
    """Takes a connection and ends it."""
    one = closing.enter_context(socket.socket())
    one.bind(("127.0.0.1", 0))
    one.listen(16)

    def serve() -> None:
        while True:
            try:
                one.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    return one.getsockname()[1]


def web_server(closing: ExitStack) -> int:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    closing.callback(server.server_close)
    closing.callback(server.shutdown)
    return server.server_port


def calls(answer: Callable[[Any, Any], Any] | None) -> Callable[[ExitStack], int]:
    """A gRPC server that answers Ray's question so; None: it knows no such question."""

    def start(closing: ExitStack) -> int:
        server = grpc.server(ThreadPoolExecutor(1))
        if answer is not None:
            handler = grpc.unary_unary_rpc_method_handler(
                answer, response_serializer=lambda reply: reply
            )
            service = grpc.method_handlers_generic_handler(
                "ray.rpc.NodeInfoGcsService", {"GetAllNodeInfo": handler}
            )
            server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        closing.callback(lambda: server.stop(0).wait())
        return port

    return start


def refuse_token(_: Any, context: Any) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: no")


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (free_port, r"no Ray cluster answers there \(Connection refused\)"),
        (silent, r"no Ray cluster answers there \(no answer in 0\.2 s\)"),
        (hanging_up, "no Ray cluster answers there|what answers there is no Ray head"),
        (web_server, "what answers there is no Ray head; its port is 6379"),
        (calls(None), "what answers there is no Ray head"),
        (
            calls(refuse_token),
            (
                "the Ray cluster there refuses this token, or a request without one; name the"
                " cluster's in"
            ),
        ),
        (
            calls(lambda *_: b""),
            (
                "a Ray head answers there, and this machine is no node of its cluster; join it with"
                " `ray start"
            ),
        ),
    ],
)
@pytest.mark.parametrize("how", ["given", "RAY_ADDRESS", "noted"])
def test_who_is_no_head_of_this_machines_is_told(
    start: Callable[[ExitStack], int],
    message: str,
    how: str,
    closing: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = f"127.0.0.1:{start(closing)}"
    if start is silent:  # what never answers need not be waited for
        monkeypatch.setattr(address, "ANSWER_SECONDS", 0.2)
    if how == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", where)
    elif how == "noted":
        note(tmp_path, where)
    place = {"given": where, "RAY_ADDRESS": f"auto, where RAY_ADDRESS says {where}"}
    with pytest.raises(UserError, match=message) as refused:
        cluster.join_ray(where if how == "given" else "auto")
    assert str(refused.value).startswith(
        "--address"
        f" {place.get(how, f'auto, where {tmp_path}/ray/ray_current_cluster says {where}')}"
    )


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(
        UserError,
        match=r"no Ray cluster answers there \(the host's name is not known\); is it started",
    ):
        cluster.join_ray("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "command",
    [
        ["train", str(CONFIGS / "quickstart.yaml"), "--out", "OUT"],
        ["sample", str(CONFIGS / "sample_best_of_n.yaml"), "--out", "OUT"],
        ["check", str(CONFIGS / "quickstart.yaml")],
        ["serve-reward", "jpeg", "--no-token", "--port", "0"],
    ],
)
def test_every_command_says_so_and_begins_nothing(
    command: list[str], closing: ExitStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, f"127.0.0.1:{free_port(closing)}")
    words = [str(tmp_path / "run") if word == "OUT" else word for word in command]
    assert main([*words, "--address", "auto"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no Ray cluster answers there (Connection refused); that head is gone" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("said", ["", "disabled", "token"])
def test_the_head_decides_whether_a_token_is_shown(
    said: str, closing: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may lie here from another cluster: Ray's processes talk to each other in one mode
    only."""
    monkeypatch.setenv("RAY_AUTH_MODE", said)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    open_head = address.find_address(f"127.0.0.1:{calls(lambda *_: b'')(closing)}")
    shut_head = address.find_address(f"127.0.0.1:{calls(refuse_token)(closing)}")
    if said == "token":
        with pytest.raises(
            UserError, match="RAY_AUTH_MODE is token, and the Ray head there asks for none"
        ):
            address.auth_mode(open_head)
    else:
        assert address.auth_mode(open_head) == "disabled"
    if said == "disabled":
        with pytest.raises(
            UserError,
            match="refuses this token, or a request without one; .* let RAY_AUTH_MODE be token",
        ):
            address.auth_mode(shut_head)
    else:
        assert address.auth_mode(shut_head) == "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="refuses this token, or a request without one"):
        address.auth_mode(shut_head)
