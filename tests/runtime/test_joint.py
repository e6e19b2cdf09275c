"""Units that wait for a reward's worker and are scored in one call: who goes together, and what
happens where such a call fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.config import RuntimeSettings
from rlalign.config.earlier import identity_of
from rlalign.core.registry import build
from rlalign.rewards.base import Reward, score
from rlalign.runtime.roles import Role, reward_role
from tests.runs import points_run

RUNTIME = RuntimeSettings(max_attempts=2)


def size_of_call(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How many pictures come at once; it fails on a blue square, and dies of two green crosses."""
    if "a blue square" in prompts:
        raise KeyError("no blue square")
    if "a green cross" in prompts and len(prompts) > 1:
        os._exit(3)
    return torch.full((len(prompts),), float(len(prompts)))


def reward_of(name: str, **settings: Any) -> Reward:
    made = build("rewards", {"name": name, **settings}, "rewards.0")
    assert isinstance(made, Reward)
    return made


def ask(
    reward: Reward, asked: Sequence[tuple[str, np.ndarray, Sequence[str]]]
) -> tuple[list[Any], int]:
    """(what one worker says to each (unit, media, prompts), all asked before it is there; how often
    something was tried again). An answer may be an exception."""
    import ray

    from rlalign.runtime.actors import RESTART
    from rlalign.runtime.engine import Pools
    from rlalign.runtime.workers import RewardWorker

    role = reward_role(reward.title)
    actor: Any = ray.remote(num_cpus=0, **RESTART)(RewardWorker).remote(reward, "cpu", 1, "it")
    retries = list[Role]()

    async def whole() -> list[Any]:
        pools = Pools(
            RUNTIME,
            [role],
            again=retries.append,
            units_per_call={reward.title: reward.units_per_call},
        )
        await pools.adopt({role: {0: actor}})
        scores = [
            pools.score([reward.title], ray.put({"media": media}), prompts, unit=unit)
            for unit, media, prompts in asked
        ]
        return await asyncio.gather(*scores, return_exceptions=True)

    found = asyncio.run(whole())
    ray.kill(actor)
    return [one if isinstance(one, Exception) else one[reward.title] for one in found], len(retries)


def pictures(count: int, side: int = 8) -> np.ndarray:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 1, 3, side, side), dtype=np.uint8)


def test_it_is_off_and_leaves_the_identity_of_a_run_alone() -> None:
    plain = points_run()
    assert {reward.units_per_call for reward in plain.rewards} == {1}
    joined = points_run("rewards=[{name: centroid, units_per_call: 4}]")
    alone = points_run("rewards=[{name: centroid}]")
    assert identity_of(joined) != identity_of(alone)
    written = points_run("rewards=[{name: centroid, units_per_call: 1}]")
    assert identity_of(written) == identity_of(alone)


@pytest.mark.ray
def test_units_that_wait_go_together_up_to_the_number(ray_cluster: None) -> None:
    """Those of another stream, and one that has no place any more, in a call of their own; media of
    another size one by one."""
    counts = [2, 1, 3, 4, 2]
    names = ["train/1/0", "train/1/1", "evaluate/1/0", "train/1/2", "train/1/3"]
    sizes = [8, 8, 8, 8, 4]
    asked = [
        (name, pictures(count, side), ["a"] * count)
        for name, count, side in zip(names, counts, sizes, strict=True)
    ]
    reward = reward_of("function", call="tests.runtime.test_joint:size_of_call", units_per_call=3)
    answers, retries = ask(reward, asked)
    assert [one.score_B.tolist() for one in answers] == [[7.0] * n for n in (2, 1)] + [
        [3.0] * 3,
        [7.0] * 4,
        [2.0] * 2,
    ]
    assert retries == 0
    assert sum(one.seconds > 0 for one in answers) == 5


@pytest.mark.promise
@pytest.mark.ray
def test_a_call_that_fails_is_asked_again_unit_by_unit(ray_cluster: None) -> None:
    """The unit that is at fault fails by itself, with the attempts that it has; the others have
    their scores."""
    from rlalign.runtime.pool import UnitFailed

    asked = [
        ("train/1/0", pictures(2), ["a", "b"]),
        ("train/1/1", pictures(1), ["a blue square"]),
        ("train/1/2", pictures(1), ["c"]),
    ]
    reward = reward_of("function", call="tests.runtime.test_joint:size_of_call", units_per_call=8)
    (first, fault, last), retries = ask(reward, asked)
    assert (first.score_B.tolist(), last.score_B.tolist()) == ([2.0, 2.0], [1.0])
    assert isinstance(fault, UnitFailed)
    assert str(fault).startswith("reward function of unit train/1/1 failed on 2 attempts")
    assert retries == 2, "the call together, and the unit's second attempt"


@pytest.mark.promise
@pytest.mark.ray
def test_a_worker_that_dies_of_a_call_is_asked_again_unit_by_unit(ray_cluster: None) -> None:
    asked = [(f"train/1/{n}", pictures(1), ["a green cross"]) for n in range(3)]
    reward = reward_of("function", call="tests.runtime.test_joint:size_of_call", units_per_call=8)
    answers, retries = ask(reward, asked)
    assert [one.score_B.tolist() for one in answers] == [[1.0]] * 3
    assert retries == 1


@pytest.mark.promise
@pytest.mark.ray
@pytest.mark.parametrize("name", ["jpeg", "shapes", "bradley_terry"])
def test_scores_are_those_of_one_unit(ray_cluster: None, name: str) -> None:
    """Bit for bit where pictures are scored one by one; of a network to rounding errors."""
    captions = ["a red circle", "a blue square", "two green crosses above a white triangle"]
    asked = [(f"train/1/{n}", pictures(n + 1, 32), captions[: n + 1]) for n in range(3)]
    reward = reward_of(name, units_per_call=3)
    scorer = reward.load("cpu")
    answers, _ = ask(reward, asked)
    for (_, media, prompts), answer in zip(asked, answers, strict=True):
        alone = score(reward, scorer, media, prompts)
        atol = 1e-4 if name == "bradley_terry" else 0.0
        np.testing.assert_allclose(answer.score_B, alone, rtol=0, atol=atol)
