"""An S3 server in a process of its own, a door before it that a test closes and opens, and its
objects as plain HTTP shows them.

RLALIGN_S3_ENDPOINT names another one that asks for no key, such as moto's:
``python -m moto.server -p 5000`` and RLALIGN_S3_ENDPOINT=http://127.0.0.1:5000.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

SIGNED = (
    "AWS4-HMAC-SHA256 Credential=a-key/20260101/us-east-1/s3/aws4_request,"
    "SignedHeaders=host,Signature=0"
)
"""For a server that tells strangers from those with a key, and takes any."""


@dataclass(frozen=True)
class Bucket:
    """A bucket, asked without any client of S3's."""

    endpoint: str
    name: str

    def url(self, folder: str) -> str:
        """The URL of a folder in it."""
        return f"s3://{self.name}/{folder}"

    def list(self, prefix: str = "") -> list[str]:
        """Every object, by its key; folders' markers are left out."""
        said = self._ask("GET", f"?list-type=2&max-keys=1000&prefix={prefix}").text
        found = re.findall("<Key>([^<]*)</Key>", said)
        return sorted(key for key in found if not key.endswith("/"))

    def read(self, key: str) -> bytes:
        return self._ask("GET", f"/{key}").content

    def write(self, key: str, content: bytes) -> None:
        self._ask("PUT", f"/{key}", content)

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/{key}")

    def copy_to(self, prefix: str, folder: Path) -> Path:
        """Everything under a prefix, as plain files."""
        for key in self.list(prefix):
            path = folder / key.removeprefix(prefix).lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(key))
        return folder

    def _ask(self, method: str, rest: str, body: bytes = b"") -> requests.Response:
        url = f"{self.endpoint}/{self.name}{rest}"
        answer = requests.request(method, url, data=body, headers={"Authorization": SIGNED})
        answer.raise_for_status()
        return answer


def name_store(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """The environment as the tools of AWS read it."""
    for name, value in environment_of(endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The endpoint of a new server; what it holds is gone with it."""
    if "RLALIGN_S3_ENDPOINT" in os.environ:
        yield os.environ["RLALIGN_S3_ENDPOINT"]
        return
    port = free_port()
    program = Path(__file__).with_name("s3_server.py")
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(program), str(port)], stdout=said, stderr=subprocess.STDOUT
        )
    try:
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def make_bucket(endpoint: str, name: str) -> Bucket:
    requests.put(f"{endpoint}/{name}").raise_for_status()
    return Bucket(endpoint, name)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class Door:
    """Carries connections to a server, until it is closed; then they are refused."""

    def __init__(self, endpoint: str) -> None:
        self._target = int(endpoint.rpartition(":")[2])
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._carried: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        door = self

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", door._target)) as there:
                    door._carried += [self.request, there]
                    back = threading.Thread(target=_carry, args=(there, self.request), daemon=True)
                    back.start()
                    _carry(self.request, there)
                    back.join()

        self._server = Server(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for one in self._carried:
            _shut(one)
        self._carried.clear()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
    _shut(target)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
