"""What the Ray runtime costs over the plain loop on the same work, and what a second rollout worker
brings.

    python benchmarks/runtime.py [rounds]

Overhead: the same run locally and on Ray, once with one core's work (one rollout worker, one shard)
and once with two; Ray's own processes need a core's share too, which a run that fills every core
feels. Medians of the rounds' seconds; the first round, which warms caches, is left out. Scaling:
seconds of rollout and reward with one and with two one-thread workers; on a machine of two cores,
those of a denoiser that sleeps show what Ray itself would allow where cores are to spare.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlalign.alignment.loop import train_local
from rlalign.config import load_run
from rlalign.runtime import train_on_ray

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def measured(folder: Path) -> dict[str, float]:
    """Medians over the rounds after the first."""
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ][1:]
    keys = [k for k in lines[0] if k.startswith("seconds/")] + ["driver_bytes_per_sample"]
    return {key: statistics.median(line[key] for line in lines) for key in keys}


ASLEEP = (
    "policy={name: sleeper:Sleeper, seconds: 0.05}",
    "plan.guidance=1.0",
    "learner.updates_per_round=1",
)

RUNS = (
    # name, rollout workers, learner shards, where, settings
    ("plain loop, one core", 1, 1, train_local, ()),
    ("Ray, one core", 1, 1, train_on_ray, ()),
    ("plain loop, both cores", 2, 2, train_local, ()),
    ("Ray, both cores", 2, 2, train_on_ray, ()),
    ("Ray, sleeping denoiser, 1 worker", 1, 1, train_on_ray, ASLEEP),
    ("Ray, sleeping denoiser, 2 workers", 2, 1, train_on_ray, ASLEEP),
)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    base = [
        f"rounds={rounds}",
        "evaluate.every=0",
        "checkpoint.every=1000",
        "evaluate.prompts=16",
        "evaluate.grid=4",
    ]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, workers, shards, train, more) in enumerate(RUNS):
            settings = [*more, f"runtime.rollout.workers={workers}", f"learner.shards={shards}"]
            folder = Path(scratch) / str(number)
            train(
                load_run(CONFIG, [*base, *settings]), folder, resume=False, on_record=lambda _: None
            )
            results[name] = measured(folder)
    table = Table(
        "run", "round s", "rollout + reward s", "update s", "sync s", "driver bytes / sample"
    )
    for name, m in results.items():
        row = (m["seconds/round"], produced(m), m["seconds/update"], m["seconds/sync"])
        table.add_row(name, *(f"{v:.3f}" for v in row), f"{m['driver_bytes_per_sample']:.0f}")
    console = Console(width=120)
    console.print(table)
    for cores in ("one core", "both cores"):
        share = (
            results[f"Ray, {cores}"]["seconds/round"]
            / results[f"plain loop, {cores}"]["seconds/round"]
            - 1
        )
        console.print(f"Ray over the plain loop, {cores}: {100 * share:+.1f} % of a round")
    for what, one, two in (
        (
            "the plain loop's two threads against one",
            "plain loop, one core",
            "plain loop, both cores",
        ),
        ("two rollout workers against one", "Ray, one core", "Ray, both cores"),
        ("the same with a denoiser that sleeps", *(name for name, *_ in RUNS[-2:])),
    ):
        console.print(f"{what}: {produced(results[one]) / produced(results[two]):.2f}x")


def produced(m: dict[str, float]) -> float:
    """Seconds in which samples are made and scored."""
    return m["seconds/rollout"] + m["seconds/reward"]


if __name__ == "__main__":
    main()
