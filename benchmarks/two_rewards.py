"""Two rewards whose spreads are far apart: what their sum learns, and normalised advantages.

    python benchmarks/two_rewards.py [points|pictures] [SEEDS]

``points`` rewards the points of ``configs/points.yaml`` for lying to the right (a hundred times the
x of the picture's brightness) and for lying high (its y). ``pictures`` rewards the embedded model
of coloured shapes for what people prefer (the fitted reward) and for a dark ground. In both the two
rewards ask for different things, so that a policy can have both. Prints the tables of
docs/canon.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def own(label: str, function: str, **arguments: Any) -> dict[str, Any]:
    """A reward of this file."""
    call = f"benchmarks.two_rewards:{function}"
    return {"name": "function", "label": label, "call": call, "arguments": arguments}


REWARDS = {
    "points": [own("right", "place", axis="x", factor=100.0), own("high", "place", axis="y")],
    "pictures": [{"name": "bradley_terry", "label": "fitted"}, own("ground", "darkness")],
}
ALGORITHMS = {
    "points": {"DDPO": "{name: ddpo, clip_range: 0.1, advantage: group}"},
    "pictures": {"GRPO": "{name: grpo, clip_range: 2.0e-3, skip_last: 0}"},
}
FILES = {"points": "points.yaml", "pictures": "tiny_grpo.yaml"}
MORE = {
    "points": ["evaluate.prompts=256"],
    "pictures": ["rounds=6", "learner.epochs=1", "evaluate.prompts=64"],
}


def place(
    media_BFCHW: torch.Tensor, prompts: Sequence[str], *, axis: str, factor: float = 1.0
) -> torch.Tensor:
    """(B,) the x (or y) of the brightness's centre, -1 to 1 rightwards (upwards), times
    ``factor``."""
    bright_BHW = media_BFCHW.mean((1, 2))
    profile_BN = bright_BHW.sum(1) if axis == "x" else bright_BHW.flip(1).sum(2)
    across_N = torch.linspace(-1.0, 1.0, profile_BN.shape[1])
    return factor * (profile_BN * across_N).sum(1) / profile_BN.sum(1).clamp(min=1e-6)


def darkness(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """(B,) minus the median brightness of the pixels: that of the ground, which fills more than
    half of a picture."""
    return -media_BFCHW.mean((1, 2)).flatten(1).median(dim=1).values


def train(task: str, way: str, algorithm: str, seed: int, folder: Path) -> dict[str, float]:
    """One run; what each reward was, and what it gained, on held-out prompts. ``way`` is how the
    two are combined, or the number of the one that is trained on alone."""
    from rlalign.alignment.loop import train_local
    from rlalign.config import load_run

    trained, held_out = REWARDS[task], []
    if way.isdigit():
        trained, held_out = [REWARDS[task][int(way)]], [REWARDS[task][1 - int(way)]]
    run = load_run(
        ROOT / "configs" / FILES[task],
        [
            f"seed={seed}",
            f"algorithm={algorithm}",
            f"rewards={json.dumps(trained)}",
            f"evaluate.rewards={json.dumps(held_out)}",
            f"combine={'sum' if way.isdigit() else way}",
            "evaluate.every=0",
            "log=[]",
            *MORE[task],
        ],
    )
    train_local(run, folder, resume=False, on_record=lambda line: None)
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {key.split("/")[1]: gain for key, gain in found["gain"].items() if key.endswith("/mean")}


def main() -> None:
    """Every way under every seed, as a table; each run on stderr as it ends."""
    task = sys.argv[1] if len(sys.argv) > 1 else "points"
    seeds = range(int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    labels = [reward["label"] for reward in REWARDS[task]]
    ways = {"sum": "sum", "normalised": "normalised"}
    if task == "points":
        ways |= {f"{label} alone": str(i) for i, label in enumerate(labels)}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in seeds:
        for title, algorithm in ALGORITHMS[task].items():
            for words, way in ways.items():
                with tempfile.TemporaryDirectory() as scratch:
                    gains = train(task, way, algorithm, seed, Path(scratch) / "run")
                found.setdefault((title, words), []).append(gains)
                print(seed, title, words, gains, file=sys.stderr, flush=True)

    print(f"| algorithm | combine | {labels[0]} gained, by seed | {labels[1]} gained, by seed |")
    print("|---|---|---|---|")
    for (title, words), runs in found.items():
        columns = [", ".join(f"{one[label]:+.3g}" for one in runs) for label in labels]
        print(f"| {title} | {words} | {columns[0]} | {columns[1]} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
