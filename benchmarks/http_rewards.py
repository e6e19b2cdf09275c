"""How much a reward server takes: requests and pictures a second, and how long an answer takes, by
number of clients.

    python benchmarks/http_rewards.py [seconds a row] [replicas]

Starts ``rlalign serve-reward jpeg`` on loopback and sends it requests that were encoded before,
each client over one kept connection, as fast as answers come; a second table puts the whole reward
(encode, send, score) beside the same reward in this process. Clients and server share the machine.
The JPEG reward is cheap, so this measures the way and not the reward.
"""

from __future__ import annotations

import os
import re
import secrets
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlalign.core.registry import build
from rlalign.rewards.base import score
from rlalign.web.client import Client
from rlalign.web.protocol import read_scores, requests_of
from rlalign.web.token import TOKEN_ENV

CLIENTS = (1, 4, 16)
PICTURES = ((1, 32), (64, 32), (1, 512), (8, 512))
"""(pictures in a request, side in pixels)."""


def drawn(count: int, side: int) -> np.ndarray:
    """Pictures that compress like photographs: coarse noise, enlarged and smoothed, with a little
    grain."""
    rng = np.random.default_rng(0)
    coarse = (
        rng.uniform(0, 255, (count, 1, 3, side // 8, side // 8))
        .repeat(8, axis=-1)
        .repeat(8, axis=-2)
    )
    smooth = (coarse + np.roll(coarse, 4, axis=-1) + np.roll(coarse, 4, axis=-2)) / 3
    return (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)


def load(
    url: str, body: bytes, count: int, clients: int, seconds: float
) -> tuple[list[float], float]:
    """(seconds of every answer that ``clients`` got, seconds in all), asking for ``seconds``. A
    failed answer raises."""
    took: list[float] = []
    failed: list[BaseException] = []
    begin = time.monotonic()
    end = begin + seconds

    def client() -> None:
        try:
            with Client(url, os.environ[TOKEN_ENV], 60) as session:
                while (start := time.monotonic()) < end:
                    answer = session.post(
                        f"{url}/score", data=body, headers={"Content-Type": "application/json"}
                    )
                    answer.raise_for_status()
                    read_scores(answer.content, count)
                    took.append(time.monotonic() - start)
        except Exception as error:  # noqa: BLE001 - told by the main thread
            failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return took, time.monotonic() - begin


def load_table(url: str, seconds: float) -> Table:
    table = Table(
        "pictures a request", "KB", "clients", "requests/s", "pictures/s", "p50 ms", "p99 ms"
    )
    for count, side in PICTURES:
        [(_, body)] = requests_of(drawn(count, side), ["a"] * count, count)
        load(url, body, count, 1, 0.5)  # warm
        for clients in CLIENTS:
            took, spent = load(url, body, count, clients, seconds)
            rate = len(took) / spent
            p50, p99 = (1000 * float(np.percentile(took, q)) for q in (50, 99))
            shown = (f"{rate:.0f}", f"{rate * count:.0f}", f"{p50:.1f}", f"{p99:.1f}")
            table.add_row(
                f"{count} of {side}x{side}", f"{len(body) / 1000:.0f}", str(clients), *shown
            )
    return table


def way_table(url: str) -> Table:
    """The same reward in this process and behind HTTP, one batch after the other in turn."""
    table = Table("64 pictures", "in process ms", "over HTTP ms", "of which encoding ms")
    for side in (32, 512):
        media, prompts = drawn(64, side), ["a"] * 64
        rewards: dict[str, Any] = {
            "here": build("rewards", {"name": "jpeg"}),
            "there": build("rewards", {"name": "http", "url": url, "batch": 64}),
        }
        scorers = {name: (reward, reward.load("cpu")) for name, reward in rewards.items()}
        took: dict[str, list[float]] = {"here": [], "there": [], "encoding": []}
        for turn in range(6):
            for name, (reward, scorer) in scorers.items():
                start = time.monotonic()
                score(reward, scorer, media, prompts)
                took[name].append(time.monotonic() - start)
            start = time.monotonic()
            list(requests_of(media, prompts, 64))
            took["encoding"].append(time.monotonic() - start)
            if turn == 0:
                took = {name: [] for name in took}  # the first warms
        table.add_row(
            f"{side}x{side}", *(f"{1000 * statistics.median(t):.0f}" for t in took.values())
        )
    return table


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    replicas = sys.argv[2] if len(sys.argv) > 2 else "1"
    os.environ[TOKEN_ENV] = secrets.token_urlsafe(32)
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "serve-reward",
        "jpeg",
        "--port",
        "0",
        "--replicas",
        replicas,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.search(r"http://\S+", said)
            if not found:
                raise SystemExit(said or "the server did not start")
            url = found.group(0)
            console = Console()
            console.print(f"{replicas} replica(s), {os.cpu_count()} cores, {seconds:g} s a row")
            console.print(load_table(url, seconds))
            console.print(way_table(url))
        finally:
            server.terminate()
            server.communicate()


if __name__ == "__main__":
    main()
