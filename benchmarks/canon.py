"""Every algorithm on the embedded task with one budget: reward, held-out reward, diversity, KL to
the base model, cost.

    python benchmarks/canon.py [rounds] [seeds] [--jobs N] [--part table|pairs|over]

Runs each contestant of ``canon_contestants.py`` under each seed as ``rlalign train ... --local`` on
one core (``--jobs`` at a time), into runs/canon/; what is there already is not run again. Then it
writes docs/canon.md and docs/images/canon*.png. An hour or two on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from canon_contestants import (
    ALIGNED_BASE,
    CONTESTANTS,
    OFFLINE,
    OFFLINE_PAIRS,
    OVER_OPTIMISATION,
    Contestant,
)
from canon_page import write_offline, write_over_optimisation, write_page
from canon_tilt import frontier

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "canon"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=12)
    parser.add_argument("seeds", nargs="?", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=None, help="contestants by name")
    parser.add_argument(
        "--part",
        choices=("table", "pairs", "over"),
        help="only the table, the pairs or over-optimisation",
    )
    given = parser.parse_args()
    chosen = [c for c in CONTESTANTS if given.only is None or c.name in given.only]
    seeds = range(given.seeds)
    if given.part in (None, "table"):
        run_all([(c, seed, given.rounds) for seed in seeds for c in chosen], given.jobs)
        write_page(ROOT / "docs", [result(c, seed) for c in chosen for seed in seeds], given.rounds)
    if given.only is None and given.part in (None, "pairs"):
        write_pairs()
        run_all([(OFFLINE, seed, OFFLINE.rounds) for seed in seeds], given.jobs)
        write_offline(ROOT / "docs", [RUNS / f"{OFFLINE.name}-{seed}" for seed in seeds])
    if given.only is None and given.part in (None, "over"):
        base = next(c for c in CONTESTANTS if c.name == ALIGNED_BASE)
        run_all([(base, 0, given.rounds)], given.jobs)
        run_all([(c, seed, c.rounds) for seed in seeds for c in OVER_OPTIMISATION], given.jobs)
        folders = [[RUNS / f"{c.name}-{seed}" for seed in seeds] for c in OVER_OPTIMISATION]
        config = ROOT / "configs" / f"{OVER_OPTIMISATION[0].config}.yaml"
        tilted = frontier(RUNS / f"{ALIGNED_BASE}-0" / "policy", config, RUNS / "tilted.json")
        write_over_optimisation(ROOT / "docs", folders[0], folders[1], tilted)


def write_pairs() -> None:
    """The set of simulated preferences: exactly OFFLINE_PAIRS of the tiny model's own samples."""
    folder = RUNS / "pairs"
    if (folder / "pairs.parquet").is_file():
        return
    # a fit of one update: the pairs are what is wanted
    settings = [
        f"out={folder}",
        f"simulate.pairs={OFFLINE_PAIRS}",
        "simulate.drawn=0",
        "contrastive.updates=0",
        "fit.updates=1",
    ]
    config = str(ROOT / "configs" / "fit_tiny_reward.yaml")
    subprocess.run(
        [sys.executable, "-m", "rlalign", "fit-reward", config, *settings], cwd=ROOT, check=True
    )


def run_all(jobs: list[tuple[Contestant, int, int]], at_a_time: int) -> None:
    """Trains (contestant, seed, rounds)."""
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(lambda job: train(*job), jobs))


def train(contestant: Contestant, seed: int, rounds: int) -> None:
    """One run in a process of its own, on one core; an earlier one that ended is kept."""
    folder = RUNS / f"{contestant.name}-{seed}"
    if (folder / "evaluation.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        f"seed={seed}",
        f"rounds={rounds}",
        "checkpoint.every=100",
        "runtime.rollout.workers=1",
        "learner.shards=1",
    ]
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "train",
        str(ROOT / "configs" / f"{contestant.config}.yaml"),
        "--local",
    ]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *settings, *contestant.settings, "--out", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"{contestant.name} seed {seed} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        )
    print(f"{contestant.name} seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def result(contestant: Contestant, seed: int) -> dict[str, Any]:
    """What a run came to: its comparison with the base model, its curve, and its cost."""
    folder = RUNS / f"{contestant.name}-{seed}"
    final = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    evaluations = [
        json.loads(line)
        for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    versions = [0, *(line["policy_version"] for line in lines)]
    updates = [b - a for a, b in itertools.pairwise(versions)]
    return {
        "contestant": contestant,
        "seed": seed,
        "final": final,
        "evaluations": evaluations,
        "reward_queries": lines[-1]["reward_queries"],
        # reward backpropagation samples inside its updates, whose calls are all among the update's
        "sampling_calls": 0 if contestant.samples_in_updates else lines[-1]["denoiser_calls"],
        "update_calls": sum(
            line.get("update_calls", 0.0) * n for line, n in zip(lines, updates, strict=True)
        ),
        "seconds": sum(line["seconds/round"] for line in lines),
        "queries_per_round": lines[0]["reward_queries"],
    }


if __name__ == "__main__":
    main()
