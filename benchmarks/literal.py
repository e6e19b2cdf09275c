"""The plain loop against a literal single-process DDPO loop: images per second at equal work and
equal numbers.

    python benchmarks/literal.py [rounds]

Both make the same samples from the same noise and take the same updates; the last columns show how
far their rewards and weights are apart afterwards. Rounds of the contestants alternate, so that a
slow minute hits all of them.
"""

from __future__ import annotations

import operator
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from literal_ddpo import LiteralDDPO
from rich.console import Console
from rich.table import Table

from rlalign.algorithms._memory import Memory
from rlalign.alignment.assemble import build_learner
from rlalign.alignment.collect import LocalCollect
from rlalign.config import Run, load_run

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
OVERRIDES = [
    "algorithm={name: ddpo, advantage: global, clip_range: 1.0e-3}",
    "runtime.rollout.workers=2",
    "learner.shards=2",
]


class PlainLoop:
    """rlalign's loop, one round at a time."""

    def __init__(self, run: Run) -> None:
        self.run, self.collect, self.learner = run, LocalCollect(run), build_learner(run)
        self.memory = Memory()

    def round(self, number: int) -> torch.Tensor:
        run = self.run
        ticket = self.collect.order(
            run.prompts.units(run.seed, number, run.plan), self.learner.weights()
        )
        scored = self.collect.gather(ticket)
        self.learner.update(run.algorithm.make_batch(scored, self.memory), round=number)
        return torch.cat([torch.from_numpy(s.total_B) for s in scored])

    def weights(self) -> torch.Tensor:
        return torch.cat([t.flatten() for t in self.learner.weights().tensors.values()])


class Literal:
    """The literal loop, one round at a time."""

    def __init__(self, run: Run, train_batch: int) -> None:
        self.run = run
        self.policy = run.policy.load("cpu")
        algorithm: Any = run.algorithm
        self.loop = LiteralDDPO(self.policy, algorithm, run.learner, train_batch=train_batch)
        self.score = run.rewards[0].load("cpu")

    def round(self, number: int) -> torch.Tensor:
        units = self.run.prompts.units(self.run.seed, number, self.run.plan)
        return torch.from_numpy(self.loop.round(units, self.score))

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.policy.network.parameters()])


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    threads = torch.get_num_threads()
    # one update a round: the loop shuffles units between updates and the literal loop does not, so
    # only the order would differ
    run = load_run(CONFIG, [*OVERRIDES, "learner.updates_per_round=1"])
    unit = run.samples_per_unit
    contestants = {
        "rlalign, plain loop": PlainLoop(run),
        f"literal loop, training batch {unit}": Literal(run, unit),
        "literal loop, training batch 4": Literal(run, 4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    rewards: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, contestant in contestants.items():
            torch.set_num_threads(1 if name.startswith("rlalign") else threads)
            start = time.monotonic()
            reward = contestant.round(number)
            seconds[name].append(time.monotonic() - start)
            rewards[name].append(float(reward.mean()))
    samples = run.prompts.per_round * run.prompts.samples_per_prompt
    first = next(iter(contestants))
    reference = contestants[first].weights()
    table = Table(
        "loop",
        "s / round",
        "images / s",
        "plain is faster by",
        "rewards",
        "largest weight difference",
    )
    for name, contestant in contestants.items():
        typical = statistics.median(seconds[name])
        table.add_row(
            name,
            f"{typical:.2f}",
            f"{samples / typical:.1f}",
            f"{statistics.median(map(operator.truediv, seconds[name], seconds[first])):.2f}x",
            " ".join(f"{r:.4f}" for r in rewards[name]),
            f"{float((contestant.weights() - reference).abs().max()):.1e}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
