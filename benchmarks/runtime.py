"""What the Ray runtime costs over the plain loop on the same work, and what a second rollout worker brings.

    python benchmarks/runtime.py [rounds]

Overhead: the same run locally with one lane and on Ray with one rollout worker; medians of the rounds' seconds (the first
round, which warms caches, is left out). Scaling: seconds of rollout and reward with one and with two one-thread workers.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlalign.config import load_run
from rlalign.loop import train_local
from rlalign.runtime import train_on_ray

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def measured(folder: Path) -> dict[str, float]:
    """Medians over the rounds after the first."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    keys = [k for k in lines[0] if k.startswith("seconds/")] + ["driver_bytes_per_sample"]
    return {key: statistics.median(line[key] for line in lines) for key in keys}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    base = [f"rounds={rounds}", "evaluate.every=0", "checkpoint.every=1000", "evaluate.prompts=16", "evaluate.grid=4"]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, workers, train in (
            ("plain loop, 1 lane", 1, train_local),
            ("Ray, 1 rollout worker", 1, train_on_ray),
            ("Ray, 2 rollout workers", 2, train_on_ray),
            ("plain loop, 2 lanes", 2, train_local),
        ):
            folder = Path(scratch) / name.replace(" ", "_").replace(",", "")
            run = load_run(CONFIG, [*base, f"runtime.rollout_workers={workers}"])
            train(run, folder, resume=False, on_record=lambda _: None)
            results[name] = measured(folder)
    table = Table("run", "round s", "rollout + reward s", "update s", "sync s", "driver bytes / sample")
    for name, m in results.items():
        produced = m["seconds/rollout"] + m["seconds/reward"]
        row = (m["seconds/round"], produced, m["seconds/update"], m["seconds/sync"])
        table.add_row(name, *(f"{v:.3f}" for v in row), f"{m['driver_bytes_per_sample']:.0f}")
    console = Console(width=120)
    console.print(table)
    local, one, two = (results[n] for n in ("plain loop, 1 lane", "Ray, 1 rollout worker", "Ray, 2 rollout workers"))
    console.print(
        f"overhead of Ray over the plain loop: {100 * (one['seconds/round'] / local['seconds/round'] - 1):+.1f} % of a round"
    )
    produced = [m["seconds/rollout"] + m["seconds/reward"] for m in (one, two)]
    console.print(f"two rollout workers against one: {produced[0] / produced[1]:.2f}x")


if __name__ == "__main__":
    main()
