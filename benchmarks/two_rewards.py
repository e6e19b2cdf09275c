"""Two rewards whose spreads are a hundredfold apart: what a sum of them learns, and what normalised
advantages do.

    python benchmarks/two_rewards.py [SEEDS]

The points of ``configs/points.yaml`` are rewarded for lying to the right (a hundred times the x of
the picture's brightness) and for lying high (its y). The two ask for different things, so that a
policy can have both. Prints the table of docs/canon.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
REWARDS = [
    {"name": "function", "label": "right", "call": "benchmarks.two_rewards:place"}
    | {"arguments": {"axis": "x", "factor": 100.0}},
    {"name": "function", "label": "high", "call": "benchmarks.two_rewards:place"}
    | {"arguments": {"axis": "y", "factor": 1.0}},
]
WAYS = {
    "sum": {"combine": "sum"},
    "normalised": {"combine": "normalised"},
    "right alone": {"rewards": REWARDS[:1], "held_out": REWARDS[1:]},
    "high alone": {"rewards": REWARDS[1:], "held_out": REWARDS[:1]},
}


def place(
    media_BFCHW: torch.Tensor, prompts: Sequence[str], *, axis: str, factor: float
) -> torch.Tensor:
    """(B,) the x (or y) of the brightness's centre, -1 to 1 rightwards (upwards), times
    ``factor``."""
    bright_BHW = media_BFCHW.mean((1, 2))
    profile_BN = bright_BHW.sum(1) if axis == "x" else bright_BHW.flip(1).sum(2)
    across_N = torch.linspace(-1.0, 1.0, profile_BN.shape[1])
    return factor * (profile_BN * across_N).sum(1) / profile_BN.sum(1).clamp(min=1e-6)


def train(way: str, algorithm: str, seed: int, folder: Path) -> dict[str, float]:
    """One run; reward -> mean before, after, and the spread within prompts in round 1."""
    from rlalign.alignment.loop import train_local
    from rlalign.config import load_run

    change = WAYS[way]
    run = load_run(
        ROOT / "configs" / "points.yaml",
        [
            f"seed={seed}",
            f"name={way.replace(' ', '-')}-{seed}",
            f"algorithm={algorithm}",
            f"rewards={json.dumps(change.get('rewards', REWARDS))}",
            f"evaluate.rewards={json.dumps(change.get('held_out', []))}",
            f"combine={change.get('combine', 'sum')}",
            "evaluate.every=0",
            "evaluate.prompts=256",
            "log=[]",
        ],
    )
    train_local(run, folder, resume=False, on_record=lambda line: None)
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    means = {}
    for title in ("right", "high"):
        key = next(k for k in found["base"] if k.endswith(f"/{title}/mean"))
        means[f"{title} before"] = found["base"][key]
        means[f"{title} gain"] = found["gain"][key]
    return means


def main() -> None:
    """Every way under every seed, as a table."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    algorithms = {
        "DDPO": "{name: ddpo, clip_range: 0.1, advantage: group}",
        "GRPO": "{name: grpo, clip_range: 0.1, skip_last: 0}",
    }
    print("| algorithm | combine | right (x 100) gained, by seed | high gained, by seed |")
    print("|---|---|---|---|")
    for title, algorithm in algorithms.items():
        for way in WAYS:
            with tempfile.TemporaryDirectory() as scratch:
                found = [train(way, algorithm, s, Path(scratch) / str(s)) for s in seeds]
            right, high = (
                ", ".join(f"{one[f'{name} gain']:+.{digits}f}" for one in found)
                for name, digits in (("right", 1), ("high", 3))
            )
            print(f"| {title} | {way} | {right} | {high} |", flush=True)
    before = {k: np.mean([v]) for k, v in found[0].items() if k.endswith("before")}
    print({name: float(value) for name, value in before.items()})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
