"""HTTP servers on loopback that answer as a test says, well or badly, and remember what they were
sent."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = tuple[int, Mapping[str, str], bytes] | None
"""Status, headers and body; None hangs up. With a header ``Drips`` the body comes byte by byte."""


@dataclass
class Scripted:
    """Where the server listens, and the (headers, body) of every request in their order."""

    url: str
    port: int
    sent: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@contextlib.contextmanager
def scripted(
    *answers: Answer | Callable[[bytes], Answer], certificate: tuple[Path, Path] | None = None
) -> Iterator[Scripted]:
    """A server that gives these answers in turn, the last one for ever; with a certificate and its
    key over TLS. A function answers by the request's body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.sent.append((dict(self.headers), body))
            scripted_one = answers[min(len(made.sent), len(answers)) - 1]
            answer = scripted_one(body) if callable(scripted_one) else scripted_one
            if answer is None:
                self.close_connection = True
            else:
                self._send(*answer)

        do_POST = do_PUT = do_HEAD = do_GET

        def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(OSError):
                for piece in (bytes([b]) for b in body) if "Drips" in headers else [body]:
                    self.wfile.write(piece)
                    time.sleep(0.05 if "Drips" in headers else 0)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "https" if certificate else "http"
    made = Scripted(f"{scheme}://127.0.0.1:{server.server_port}", server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
