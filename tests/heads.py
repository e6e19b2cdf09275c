"""Heads of Ray clusters in processes of their own, with a token, and rlalign's commands beside
them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.stores import free_port


@dataclass(frozen=True)
class Head:
    """Where its dashboard is, the environment that has its token's file, and the token."""

    address: str
    environment: dict[str, str]
    token: str
    process: subprocess.Popen[bytes]

    def rlalign(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of rlalign's, about this cluster."""
        return rlalign(self.environment, *arguments, f"--address={self.address}")

    def kill(self) -> None:
        """SIGKILL for the head and everything that it has started: the machine is gone."""
        subprocess.run(["pkill", "-KILL", "-s", str(self.process.pid)], check=False)
        self.process.wait(600)


@contextlib.contextmanager
def start_head(folder: Path, environment: Mapping[str, str]) -> Iterator[Head]:
    """A head that listens on loopback only; ``folder`` gets its token and its log."""
    token, port = secrets.token_hex(16), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(token)
    around = {
        **os.environ,
        **environment,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }
    around["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{around['PATH']}"
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={free_port()}",
    ]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--num-cpus=8"]
    command += [
        f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]
    started = subprocess.Popen(
        command,
        env=around,
        start_new_session=True,
        stdout=(folder / "head.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    head = Head(address, around, token, started)
    try:
        while head.rlalign("list", "jobs").returncode:
            assert started.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield head
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(600)
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(started.pid)], check=False)


def rlalign(
    environment: Mapping[str, str], *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlalign", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
