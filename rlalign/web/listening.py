"""How a server of ours listens: the address, the certificate, the bounds of a connection, and how
the body of a request is read."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from rlalign.core.registry import UserError
from rlalign.web.refused import Refused

if TYPE_CHECKING:
    import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
"""An ASGI application."""

MAX_CONNECTIONS = 256
MAX_HEADER_BYTES = 16 * 1024
BODY_SECONDS = 30.0
"""How long a client may take to send a body."""


class Gone(Exception):
    """The client has hung up."""


async def read_body(length: int, receive: Receive) -> bytes:
    """A body of at most ``length`` bytes. Raises Refused where it takes too long."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > length:
                    raise Refused(413, "the body is longer than Content-Length says")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise Refused(408, f"the body must arrive within {BODY_SECONDS:g} seconds") from error


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises UserError where the address
    cannot be had."""
    # a busy port is refused before anything is loaded
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
            "name an address of this machine and a free port"
        ) from error


def url_of(made: socket.socket, *, encrypted: bool) -> str:
    """The URL under which a socket answers."""
    host, port = made.getsockname()[:2]
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def certificate_files(certificate: str, key: str, place: str) -> dict[str, Any]:
    """What ``listen`` needs for https: a certificate chain and its private key, PEM files; {} where
    neither is named. Raises UserError, naming the settings ``place.certificate`` and
    ``place.key``."""
    if bool(certificate) != bool(key):
        raise UserError(f"{place}.certificate and {place}.key go together: a PEM file each")
    if not certificate:
        return {}
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise UserError(
            f"{place}.certificate {certificate!r} and {place}.key {key!r} cannot be used"
            f" ({getattr(error, 'strerror', None) or error}); both must be PEM, the key without a"
            " password"
        ) from error
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


async def listen(
    application: Application,
    made: socket.socket,
    *,
    on_ready: Callable[[], None],
    on_end: Callable[[], None] = lambda: None,
    **settings: Any,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets the requests under way finish. In a thread: until
    it is cancelled.

    ``on_end`` is told when the end begins, for answers that would never finish by themselves.
    ``settings`` are uvicorn's: the certificate (``certificate_files``), and what is not as
    ``_server`` has it.
    """
    # whoever ends it lets open requests be answered
    server = _server(application, settings)

    def end() -> None:
        server.should_exit = True
        on_end()

    # a signal ends the server, and so does the end of the task
    loop = asyncio.get_running_loop()

    # in another thread no signal comes
    with contextlib.suppress(RuntimeError, ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)

    # the caller hears of the start only once requests are taken
    serving = asyncio.create_task(server.serve(sockets=[made]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            on_ready()
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        end()
        await serving
        raise


def _server(application: Application, settings: Mapping[str, Any]) -> uvicorn.Server:
    import uvicorn

    # h11 bounds what a request's head may hold; without lifespan and websockets there is nothing
    # but requests; a client's word about its own address is not taken
    usual: dict[str, Any] = {
        "http": "h11",
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "error",  # a stranger's malformed requests fill no log
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "limit_concurrency": MAX_CONNECTIONS,
        "timeout_keep_alive": 60,
        "timeout_graceful_shutdown": 10,
    }
    config = uvicorn.Config(application, **{**usual, **settings})  # type: ignore[arg-type]
    config.load()
    server = uvicorn.Server(config)

    # it would raise the signals again at the end
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    return server
