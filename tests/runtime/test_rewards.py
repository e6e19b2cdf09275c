"""Rewards that a policy worker asks in other processes: who is asked first, and that answers are
those of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.config import RuntimeSettings
from rlalign.core.prompts import Prompt, record_of
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.data.prompts.base import prompt_id
from rlalign.engine.local import LiveRewards
from rlalign.rewards.base import Reward

PROMPTS = ("a red circle", "a blue square", "a green triangle")


def reward(name: str, **settings: Any) -> Reward:
    made = build("rewards", {"name": name, **settings}, "reward")
    assert isinstance(made, Reward)
    return made


def asked_of(rewards: tuple[Reward, ...], actors: dict[str, list[Any]]) -> Any:
    from rlalign.runtime.rewards import RewardActors

    return RewardActors(rewards=rewards, held_out=(), actors=actors, runtime=RuntimeSettings())


def test_neighbours_prefer_different_workers() -> None:
    asked = asked_of((), {"shapes": ["a", "b", "c"], "jpeg": ["d"]})
    first = [asked.prefer(number).actors["shapes"][0] for number in range(5)]
    assert first == ["a", "b", "c", "a", "b"]
    assert asked.prefer(4).actors == {"shapes": ["b", "c", "a"], "jpeg": ["d"]}


def length_of_words(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How many letters each prompt's record has."""
    return torch.tensor([float(len(record_of(prompt).get("words", ""))) for prompt in prompts])


@pytest.mark.ray
def test_records_arrive_in_other_processes(ray_cluster: None) -> None:
    """With the rows of a unit that travels whole, and with prompts alone."""
    import ray

    from rlalign.runtime.rewards import RemoteRewards
    from rlalign.runtime.workers import RewardWorker

    call = "tests.runtime.test_rewards:length_of_words"
    rewards = (reward("function", call=call, label="words"),)
    make: Any = ray.remote(num_cpus=0)(RewardWorker)
    remote = RemoteRewards(asked_of(rewards, {"words": [make.remote(rewards[0], "cpu", 1, "it")]}))
    prompts = (Prompt("a sign", {"words": "OPEN"}), "a cat", Prompt("a sign", {"words": "NO"}))
    unit = Unit.of_rows(
        UnitKey("train", 1, 0), [(prompt_id(p), p, 0) for p in prompts], 0, Plan(steps=1)
    )
    there = ray.get(ray.put(unit.take([2, 0])))
    found = remote.scores({"media": torch.zeros(2, 1, 3, 8, 8)}, there.prompts)
    assert found.raw["words"].tolist() == [2.0, 4.0]
    assert there.prompt_ids == tuple(map(prompt_id, there.prompts))


@pytest.mark.promise
@pytest.mark.ray
def test_answers_are_those_of_one_process(ray_cluster: None) -> None:
    """Scores, counts and gradients, bit for bit."""
    import ray

    from rlalign.runtime.rewards import RemoteRewards
    from rlalign.runtime.workers import RewardWorker

    rewards = (reward("bradley_terry", label="fitted"), reward("shapes", weight=0.5))
    make: Any = ray.remote(num_cpus=0, max_restarts=-1)(RewardWorker)
    actors = {r.title: [make.remote(r, "cpu", 1, f"reward {r.title} 0")] for r in rewards}
    remote = RemoteRewards(asked_of(rewards, actors))
    here = LiveRewards(rewards)
    media = torch.rand(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    mine, theirs = (one.scores({"media": media}, PROMPTS) for one in (here, remote))
    np.testing.assert_array_equal(mine.total_B, theirs.total_B)
    for title in ("fitted", "shapes"):
        np.testing.assert_array_equal(mine.raw[title], theirs.raw[title])
    values, pull = here.gradient_of(rewards[0], media, PROMPTS)
    values_there, pull_there = remote.gradient_of(rewards[0], media, PROMPTS)
    np.testing.assert_array_equal(values, values_there)
    assert torch.equal(pull, pull_there)
    assert (here.queries, here.missing) == (remote.queries, remote.missing) == (6, 0)
