"""Proxies and dashboards that remember what they were asked, and an environment in which every
variable names the proxy."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass
class Seen:
    """Where a server listens, and every request that it got."""

    url: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path or target, Authorization)."""
    bodies: list[bytes] = field(default_factory=list)
    """Of requests that have one."""
    carried: bytearray = field(default_factory=bytearray)
    """What a tunnel carried, both ways."""


class _Proxy(BaseHTTPRequestHandler):
    """Refuses what is not encrypted; tunnels every CONNECT to ``server.target``, whatever host it
    names."""

    def do_GET(self) -> None:
        seen: Seen = self.server.seen  # type: ignore[attr-defined]
        seen.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if self.command != "CONNECT" or self.server.target is None:  # type: ignore[attr-defined]
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: there, there: self.connection}
            while True:
                for ready in select.select(list(ends), [], [], 30)[0]:
                    piece = ready.recv(65536)
                    if not piece:
                        self.close_connection = True
                        return
                    seen.carried += piece
                    ends[ready].sendall(piece)

    do_POST = do_PUT = do_HEAD = do_CONNECT = do_GET

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def proxy(target: int | None = None) -> Iterator[Seen]:
    """A proxy on loopback; ``target`` is the port to which it tunnels."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    server.daemon_threads = True
    server.target = target  # type: ignore[attr-defined]
    server.seen = Seen(url=f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def web(app_of: Any) -> Iterator[Seen]:
    """An aiohttp application of ``app_of(seen)`` on loopback, in a thread."""
    import asyncio

    from aiohttp import web as aio

    seen, ready, loop = Seen(), threading.Event(), asyncio.new_event_loop()

    @aio.middleware
    async def remember(request: Any, handler: Any) -> Any:
        seen.asked.append((request.method, request.path, request.headers.get("Authorization")))
        if body := await request.read():
            seen.bodies.append(body)
        return await handler(request)

    async def start() -> Any:
        app: Any = app_of(seen)
        app.middlewares.append(remember)
        runner = aio.AppRunner(app)
        await runner.setup()
        site = aio.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        seen.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(600)
    try:
        yield seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(600)


def name_proxy(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Every variable of the environment names the proxy, none excepts a host, and ~/.netrc has a
    password for loopback."""
    for name in VARIABLES:
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "NO_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    (home / ".netrc").write_text(
        "machine 127.0.0.1 login me password hunter2\nmachine localhost login me password hunter2\n"
    )
    (home / ".netrc").chmod(0o600)


JOB = {
    "submission_id": "first",
    "status": "RUNNING",
    "metadata": {"rlalign": "0", "folder": "/shared/runs/first"},
    "driver_node_id": "abc",
    "driver_info": {"id": "01000000"},
    "start_time": 1,
    "message": "",
}


STATUS = {"job": "first", "round": 2, "rounds": 30, "seconds_per_round": 3.0, "eta_seconds": 84.0}


def dashboard(_: Seen) -> Any:
    """What rlalign asks of Ray's dashboard: one running job, and every submitted one succeeds at
    once."""
    from aiohttp import web as aio

    async def answer(request: Any) -> Any:
        path = request.path
        if path.endswith("/logs/tail"):
            pieces = aio.WebSocketResponse()
            await pieces.prepare(request)
            await pieces.send_str("first words\n")
            await pieces.send_str("last words\n")
            await pieces.close()
            return pieces
        if path.startswith("/api/packages/"):
            return aio.Response(status=404 if request.method == "GET" else 200)
        if request.method == "POST":
            said = json.loads(await request.read())
            name = said.get("submission_id") or "helper"
            return aio.json_response({"job_id": name, "submission_id": name})
        if path == "/api/v0/logs/file":
            return aio.Response(text=json.dumps(STATUS))
        return aio.json_response(
            {
                "/api/version": {"ray_version": "2.60.0", "version": "4"},
                "/api/jobs/": [JOB],
                "/api/jobs/first": JOB,
                "/api/jobs/helper": {**JOB, "status": "SUCCEEDED"},
            }.get(path, {"logs": "Running entrypoint: x\nasked it\n"})
        )

    app = aio.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", answer)
    return app
