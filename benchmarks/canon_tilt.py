"""The base model's own samples under weights exp(reward / beta): the least KL that a gain can cost,
prompt by prompt.

Of all policies with some mean reward, the one nearest to the base model in KL is the base model
tilted so (Rafailov 2023, arXiv:2305.18290, eq. 4). Its held-out score says what a gain costs a
policy that is held as well as can be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.config import load_run
from rlalign.core import registry
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.diffusion.rollout import rollout
from rlalign.rewards.base import score

PROMPTS, SAMPLES = 32, 64
LEAST = 4.0
"""Samples a prompt that the weights must come to (Kish's effective number), for the mean to mean
something."""


def frontier(policy: Path, config: Path, kept: Path) -> list[tuple[float, float]]:
    """(kB saved, held-out score) from no weights to sharp ones; read from ``kept`` where it is
    there."""
    if kept.is_file():
        return [(x, y) for x, y in json.loads(kept.read_text(encoding="utf-8"))]
    reward_PG, held_out_PG = samples(policy, config)
    found = []
    for beta in np.geomspace(2.0, 0.02, 25):
        weight_PG = np.exp((reward_PG - reward_PG.max(1, keepdims=True)) / beta)
        weight_PG /= weight_PG.sum(1, keepdims=True)
        if (1.0 / (weight_PG**2).sum(1)).mean() < LEAST:
            break
        gain = (weight_PG * reward_PG).sum(1).mean() - reward_PG.mean()
        found.append((float(gain), float((weight_PG * held_out_PG).sum(1).mean())))
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def samples(folder: Path, config: Path) -> tuple[np.ndarray, np.ndarray]:
    """(P, G) rewards and held-out scores of the policy's samples for the run file's held-out
    prompts."""
    run = load_run(config, [])
    recipe: Any = registry.build("policies", {"name": "tiny", "path": str(folder)})
    policy = recipe.load("cpu")
    rewards = run.rewards_for("evaluate")
    scorers = [r.load("cpu") for r in rewards]
    columns: list[list[np.ndarray]] = [[] for _ in rewards]
    for number, (_, prompt) in enumerate(run.prompts.held_out(PROMPTS)):
        unit = Unit(
            key=UnitKey("evaluate", 0, number),
            prompts=(prompt,) * SAMPLES,
            prompt_ids=(number,) * SAMPLES,
            sample_ids=tuple(range(SAMPLES)),
            seed=run.seed,
            plan=Plan(steps=run.plan.steps),
        )
        _, media = rollout(policy, unit, 0)
        for column, reward, scorer in zip(columns, rewards, scorers, strict=True):
            column.append(score(reward, scorer, media, unit.prompts))
    reward_PG, held_out_PG = (np.stack(column).astype(np.float64) for column in columns)
    return reward_PG, held_out_PG
