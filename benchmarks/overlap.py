"""What one Ray worker gains where the next piece of work begins while one waits: the same pieces
one after the other and two at a time, in turns.

    python benchmarks/overlap.py [turns] [cases]

A denoiser that sleeps stands for one that computes on a card: what is left of the time is words,
weights, hand-off and scores. The embedded model shows a CPU's one core, where nothing is idle but
what waits for another process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from sleeper import SleeperFamily

from rlalign.alignment.models import Model
from rlalign.config import RuntimeSettings
from rlalign.core import registry
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.engine import Work
from rlalign.engine.pieces import Rollout, ScoredAdvance
from rlalign.policies.base import OWN_SIZE, Condition, PolicyRecipe
from rlalign.runtime.actors import create_reward_worker
from rlalign.runtime.engine import RayEngine
from rlalign.runtime.groups import create_policy_worker
from rlalign.runtime.rewards import RewardActors
from rlalign.runtime.roles import ROLLOUT, reward_role
from rlalign.runtime.workers import PolicySource

PIECES = 6
STEPS = 10
REWARD_SECONDS = 0.5
WORDS_SECONDS = 0.02


class CardFamily(SleeperFamily):
    """A denoiser that sleeps, of latents (16, 128, 128), with words that take a while each time."""

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        time.sleep(WORDS_SECONDS * len(prompts))
        return super().encode(prompts, plan)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents[:, :, ::4, ::4])

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (16, 128, 128)


class Card(PolicyRecipe):
    """``seconds`` a call. Source: none, a benchmark's own."""

    family = CardFamily

    seconds: float = Field(default=0.05, ge=0, description="seconds that a call sleeps")

    def build(self, device: str) -> CardFamily:
        return CardFamily(self.seconds)


def slow_score(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The mean of each picture, later: as a reward on another machine."""
    time.sleep(REWARD_SECONDS)
    return media_BFCHW.mean((1, 2, 3, 4))


CASES = (
    # what, policy, reward, rows, whether scores are asked for
    ("sleeping denoiser, units of 47 MB", {"name": "overlap:Card"}, None, 4, False),
    (
        "sleeping denoiser, a score of 0.5 s",
        {"name": "overlap:Card"},
        "overlap:slow_score",
        1,
        True,
    ),
    ("embedded model, units", {"name": "tiny"}, None, 8, False),
    ("embedded model, a score of 0.5 s", {"name": "tiny"}, "overlap:slow_score", 8, True),
    ("embedded model, jpeg", {"name": "tiny"}, "jpeg", 8, True),
)


def main() -> None:
    import ray

    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    cases = CASES[: int(sys.argv[2])] if len(sys.argv) > 2 else CASES
    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    try:
        for title, policy, reward, rows, scored in cases:
            one, two = measured(policy, reward, rows, scored, turns)
            ratios = sorted(a / b for a, b in zip(one, two, strict=True))
            medians = [f"{statistics.median(some):.2f}" for some in (one, two)]
            middle = statistics.median(ratios)
            print(
                f"{title}: one after the other {medians[0]} s, two at a time {medians[1]} s, ratio"
                f" {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )
    finally:
        ray.shutdown()


def measured(
    policy: dict[str, Any], reward: str | None, rows: int, scored: bool, turns: int
) -> tuple[list[float], list[float]]:
    """Seconds of all pieces, one after the other and two at a time, a turn after the other."""
    import ray

    runtime = RuntimeSettings()
    actors: dict[str, list[Any]] = {}
    rewards: list[Any] = []
    if reward is not None:
        said = {"name": "function", "call": reward} if ":" in reward else {"name": reward}
        rewards = [registry.build("rewards", said, "rewards.0")]
        made = create_reward_worker("overlap", 0, rewards[0], runtime, counts=False)
        actors[rewards[0].title] = [made]
    asked = RewardActors(rewards=tuple(rewards), held_out=(), actors=actors, runtime=runtime)
    recipe: Any = registry.build("policies", policy, "policy")
    source = PolicySource(
        model=Model(title="policy", recipe=recipe),
        runtime=runtime,
        rewards=asked if rewards else None,
    )
    worker = create_policy_worker("overlap", 0, source, counts=False)
    members = {ROLLOUT: [worker], **{reward_role(t): some for t, some in actors.items()}}
    found: dict[int, list[float]] = {1: [], 2: []}
    try:
        engines = {
            seats: RayEngine(runtime, members, unit_of(0, rows), rows=rows, seats=seats)
            for seats in found
        }
        works = {seats: pieces(engine, rows, scored) for seats, engine in engines.items()}
        # the first turn warms up
        for turn in range(turns + 1):
            for seats in found if turn % 2 else reversed(found):
                start = time.perf_counter()
                engines[seats].perform(works[seats])
                if turn:
                    found[seats].append(time.perf_counter() - start)
        for engine in engines.values():
            engine.close()
    finally:
        for actor in (worker, *(one for some in actors.values() for one in some)):
            ray.kill(actor)
    return found[1], found[2]


def pieces(engine: RayEngine, rows: int, scored: bool) -> list[Work]:
    units = [unit_of(index, rows) for index in range(PIECES)]
    if not scored:
        return [Rollout(unit=unit, version=0) for unit in units]
    return [ScoredAdvance(unit=unit, x=engine.begin(unit), stop=STEPS) for unit in units]


def unit_of(index: int, rows: int) -> Unit:
    ids = tuple(range(rows))
    return Unit(
        key=UnitKey("train", 1, index),
        prompts=("a red circle above a blue square",) * rows,
        prompt_ids=ids,
        sample_ids=tuple(np.array(ids) + index * rows),
        seed=0,
        plan=Plan(steps=STEPS, eta=1.0),
    )


if __name__ == "__main__":
    main()
