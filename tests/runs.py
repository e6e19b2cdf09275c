"""Small real runs on the embedded model, and how two of them are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlalign.config import Run, load_run

CONFIGS = Path(__file__).parent.parent / "configs"

SMALL = (
    "rounds=4",
    "plan.steps=3",
    "rewards=[{name: shapes}, {name: jpeg, weight: 0.5}]",
    "prompts.per_round=4",
    "prompts.samples_per_prompt=2",
    "prompts.per_unit=1",
    "learner.updates_per_round=2",
    "learner.shards=2",
    "evaluate.prompts=4",
    "evaluate.every=2",
    "evaluate.grid=4",
    "checkpoint.every=2",
    "runtime.rollout.workers=2",
)


def small_run(*overrides: str, config: str = "quickstart") -> Run:
    """Four rounds of eight samples: seconds of work."""
    return load_run(CONFIGS / f"{config}.yaml", [*SMALL, *overrides])


POINTS = ("rewards=[{name: centroid}, {name: jpeg, weight: 0.5}]", "learner.epochs=1")


def points_run(*overrides: str) -> Run:
    """The same rounds, updates and rewards' number on points in the plane: a tenth of the time."""
    return small_run(*POINTS, *overrides, config="points")


def two_rounds_of_points(*, samples_per_prompt: int, **settings: Any) -> dict[str, Any]:
    """A run file of two rounds in the plane, of two prompts."""
    return {
        "name": "points",
        "rounds": 2,
        "policy": {"name": "points"},
        "plan": {"steps": 4},
        "prompts": {
            "name": "list",
            "prompts": ["left", "up"],
            "per_round": 2,
            "per_unit": 1,
            "samples_per_prompt": samples_per_prompt,
        },
    } | settings


def quiet(_: object) -> None:
    """No screen."""


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run, without what depends on the clock or on accidents."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    volatile = ("seconds", "restarts/", "nodes/", "driver_bytes")
    return [{k: v for k, v in line.items() if not k.startswith(volatile)} for line in lines]


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from rlalign.learning import checkpoint

    return dict(checkpoint.read_tensors(folder))


def assert_same_run(folder: Path, other: Path) -> None:
    """Bitwise: every metrics line, every evaluation, every tensor of the last checkpoint."""
    assert metrics(folder) == metrics(other)
    assert metrics(folder, "evaluations.jsonl") == metrics(other, "evaluations.jsonl")
    mine, theirs = final_tensors(folder), final_tensors(other)
    assert mine.keys() == theirs.keys()
    different = [n for n in mine if not torch.equal(mine[n], theirs[n])]
    assert not different, f"{len(different)} tensors differ, first {different[:3]}"
