"""A network inside this machine, in which Ray may listen as on a cluster: Linux namespaces, gone
with all processes at exit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HEAD = "10.77.0.1"  # every address of 10.77.0.0/24 is this machine, inside
_INSIDE = (
    "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && ip link set lo up && "
    f"ip addr add {HEAD}/24 dev lo && echo ready && exec sleep 3600"
)
_NEW = [
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]


def missing() -> str:
    """Why there can be no private network here; "" when there can."""
    tools = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}"
    made = subprocess.run([*_NEW, "true"], capture_output=True, text=True)
    return f"this system gives no namespaces: {made.stderr.strip()}" if made.returncode else ""


class Network:
    """Starts processes inside."""

    def __init__(self, process: int) -> None:
        self._enter = [
            "nsenter",
            "--target",
            str(process),
            "--user",
            "--net",
            "--pid",
            "--mount",
            "--preserve-credentials",
        ]

    def run(
        self, *command: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command that ends."""
        return subprocess.run([*self._enter, *command], env=env, capture_output=True, text=True)

    def start(self, *command: str, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A command that goes on; what it prints goes to ``log``."""
        with log.open("wb") as out:
            return subprocess.Popen(
                [*self._enter, *command], env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def status_of(self, url: str, token: str = "") -> int:
        """The HTTP status that a URL answers with inside; 0 where nothing answers."""
        header = f"Authorization: Bearer {token}" if token else "X-None: none"
        done = subprocess.run(
            [*self._enter, *"curl --noproxy * -s -o /dev/null -w %{http_code} -H @-".split(), url],
            input=header, capture_output=True, text=True,
        )  # fmt: skip
        return int(done.stdout or 0)

    def text_of(self, url: str, token: str) -> str:
        """What a URL answers inside."""
        done = subprocess.run(
            [*self._enter, "curl", "--noproxy", "*", "-s", "-H", "@-", url],
            input=f"Authorization: Bearer {token}", capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout

    def command_lines(self) -> str:
        """Every process inside with its arguments, as `ps` shows them to anyone."""
        return self.run("ps", "-e", "-ww", "-o", "args").stdout


@contextmanager
def private_network() -> Iterator[Network]:
    """A network, and all processes inside killed at the end."""
    holder = subprocess.Popen([*_NEW, "bash", "-c", _INSIDE], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        yield Network(int(children[0]))
    finally:
        holder.kill()
        holder.wait()


def wait_for(what: str, condition, log: Path | None = None, seconds: float = 800) -> None:
    """Waits until ``condition()`` holds; fails with the end of ``log`` before the test's own limit
    ends it."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-3000:] if log else ""
            raise AssertionError(f"{what}: not within {seconds:g} s\n{tail}")
        time.sleep(0.2)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what tests set for Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}
