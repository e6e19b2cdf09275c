"""rlalign against TRL's own DDPOTrainer on the shipped pipeline: images per second at equal work.

    python benchmarks/peers.py [--rounds 3] [--prompts 16] [--peers FOLDER] [--only NAME ...]
        [--set SETTING ...] [--other CHECKOUT] [--bound]

The quickstart's work under guidance 2: 16 prompts with 8 samples of ten steps, two updates of all
weights, with minus the size as JPEG for a reward, which leaves no sample without an advantage. The
batches, learning rate, clipping and AdamW's settings are the same; so is the work, which the column
"rows" shows: rows that the denoiser was asked about, and those with a backward pass. Each
contestant is a process of its own that rests while others work. Rounds alternate, and every other
time the order is turned round; a first round of each, which warms caches, is left out. FOLDER has
TRL 0.23.1 where it is not beside rlalign (benchmarks/README.md). `--set` are settings of the run
file for a further contestant, rlalign with these settings; CHECKOUT is another one's, rlalign as it
was (`git worktree add CHECKOUT COMMIT`). `--bound` measures what matrix products
allow: in one process, and in two at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OVERRIDES = (
    "plan.guidance=2.0",
    "rewards=[{name: jpeg}]",
    "algorithm={name: ddpo, advantage: global, clip_range: 1.0e-3}",
)
OF_A_PROMPT = 8
STEPS = 10
"""Samples and denoising steps, as in the quickstart."""
ROWS_OF_A_STEP = 2
"""A guided step asks about the caption and about none."""
RLALIGN = "rlalign"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a contestant does a round."""

    kind: str
    """One of those in `peers_contestants.py`."""
    threads: int = 1
    """Inside an operation; 0 leaves torch's own number."""
    settings: tuple[str, ...] = ()
    checkout: Path = HERE.parent
    peers: Path | None = None
    """A folder of packages beside rlalign's own."""


class Child:
    """A contestant's process."""

    def __init__(self, way: Way, size: tuple[str, ...]) -> None:
        job = {"threads": way.threads, "overrides": [*OVERRIDES, *size, *way.settings]}
        folders = [str(way.checkout), *([str(way.peers)] if way.peers else [])]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers_contestants.py"), way.kind, json.dumps(job)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rounds: list[dict[str, float]] = []
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a contestant ended with {self._process.wait()}; its words are above")
        return json.loads(line)

    def round(self, number: int) -> None:
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        self.rounds.append(self._answer())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def bound_of(samples: int) -> str:
    """What the matrix product of one process, and of two at a time, allows a round at most."""
    alone = products(1)
    together = products(2)
    work = json.loads(called("flops").communicate()[0])
    # a row is asked about in the rollout and in an update
    rows = samples * STEPS * ROWS_OF_A_STEP
    flops = rows * (2 * work["forward"] + work["backward"])
    lines = [
        f"matrix product: {alone[0]:.0f} GFLOP/s in one process,"
        f" {' + '.join(f'{one:.0f}' for one in together)} in two at a time",
        f"the UNet: {work['forward'] / 1e9:.3f} GFLOP a row forward, {work['backward'] / 1e9:.3f}"
        f" back; a round of {rows} rows, forward twice and back once, {flops / 1e9:.0f} GFLOP",
        f"a round at that rate: {flops / 1e9 / sum(together):.1f} s on two cores",
    ]
    return "\n".join(lines)


def products(processes: int) -> list[float]:
    """GFLOP/s of the matrix product in each of some processes at a time."""
    started = [called("product") for _ in range(processes)]
    return [json.loads(one.communicate()[0])["rate"] for one in started]


def called(kind: str) -> subprocess.Popen[str]:
    """A process that measures one thing, and says it in a line of JSON."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "peers_bound.py"), kind],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )


def begin(given: argparse.Namespace) -> dict[str, Child]:
    """The processes of those who take part."""
    ways = {
        RLALIGN: Way(kind="rlalign"),
        "TRL, torch's own threads": Way(kind="trl", threads=0, peers=given.peers),
        "TRL, 1 thread": Way(kind="trl", peers=given.peers),
    }
    if given.set:
        ways[f"rlalign, {' '.join(given.set)}"] = Way(kind="rlalign", settings=tuple(given.set))
    if given.other:
        ways["rlalign, the other checkout"] = Way(kind="rlalign", checkout=given.other.resolve())
    chosen = given.only or ways
    size = (f"prompts.per_round={given.prompts}",)
    return {
        name: Child(way, size) for name, way in ways.items() if any(part in name for part in chosen)
    }


def spread(values: list[float], form: str) -> str:
    """The median with the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def table_of(children: dict[str, Child], samples: int) -> Table:
    """Medians of the rounds after the first."""
    table = Table(
        "contestant",
        "s / round",
        "images / s",
        "CPU s / round",
        "of it system",
        "page faults / sample",
        "rows, of them with backward",
        "rewards",
    )
    for name, child in children.items():
        rounds = child.rounds[1:]
        seconds = [one["seconds"] for one in rounds]
        typical = statistics.median(seconds)
        table.add_row(
            name,
            spread(seconds, ".1f"),
            f"{samples / typical:.2f}",
            spread([one["user"] + one["system"] for one in rounds], ".1f"),
            f"{statistics.median(one['system'] for one in rounds):.1f}",
            f"{statistics.median(one['faults'] for one in rounds) / samples:.0f}",
            " ".join(sorted({f"{one['rows']:.0f}, {one['learned']:.0f}" for one in rounds})),
            " ".join(f"{one['reward']:.3f}" for one in child.rounds),
        )
    return table


def ratios_of(children: dict[str, Child]) -> Table:
    """How often as fast as each other one rlalign is, round by round."""
    table = Table("rlalign is as fast as", "times, by the clock", "times, by CPU seconds")
    own = children[RLALIGN].rounds[1:]
    for name, child in children.items():
        if name == RLALIGN:
            continue
        pairs = list(zip(child.rounds[1:], own, strict=True))
        clock = [one["seconds"] / mine["seconds"] for one, mine in pairs]
        cpu = [(o["user"] + o["system"]) / (m["user"] + m["system"]) for o, m in pairs]
        table.add_row(name, spread(clock, ".2f"), spread(cpu, ".2f"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="beside the first one")
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    parser.add_argument("--peers", type=Path, help="a folder that TRL is installed into")
    parser.add_argument("--only", nargs="+", default=(), help="parts of contestants' names")
    parser.add_argument("--set", nargs="+", default=(), help="settings for one more contestant")
    parser.add_argument("--other", type=Path, help="another checkout, of rlalign as it was")
    parser.add_argument("--bound", action="store_true", help="measure matrix products too")
    given = parser.parse_args()
    console = Console(width=170)
    if given.bound:
        console.print(bound_of(given.prompts * OF_A_PROMPT))
    children = begin(given)
    for number in range(1, given.rounds + 2):
        order = list(children.values())
        for child in order if number % 2 else reversed(order):
            child.round(number)
    for child in children.values():
        child.end()
    console.print(table_of(children, given.prompts * OF_A_PROMPT))
    if RLALIGN in children:
        console.print(ratios_of(children))


if __name__ == "__main__":
    main()
