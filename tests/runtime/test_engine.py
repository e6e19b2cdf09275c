"""The engine on real workers: a run's units and a sampling's pieces through the same pools, and
what is done once more."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.alignment.models import Model
from rlalign.config import RuntimeSettings
from rlalign.core.records import Plan, Unit
from rlalign.core.registry import UserError, build
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.rollout import rollout
from rlalign.engine import Look, WorkResult, expand
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Pictures, Rollout
from rlalign.policies.base import OWN_SIZE
from rlalign.rewards.base import Reward, Scorer
from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from tests.toy import Toy, ToyFamily, ToyPolicy, make_units

pytestmark = pytest.mark.ray

RUNTIME = RuntimeSettings(max_attempts=2)
FAULTY = reward_role("faulty")


class DoubleToy(Toy):
    """The toy denoiser in float64. Source: none, a test's own."""

    def load(self, device: str, **how: Any) -> ToyPolicy:
        return ToyPolicy(seed=self.seed, dtype=torch.float64)


class Refused(Reward):
    """A reward that is not there. Source: none, a test's own."""

    def load(self, device: str) -> Scorer:
        raise UserError("rewards.refused: there is none; take another")


def red(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The red of each picture; none of a blue square, alone or with others."""
    if "a blue square" in prompts:
        raise KeyError("no blue square")
    return media_BFCHW[:, :, 0].mean((1, 2, 3))


def reward_of(name: str, **settings: Any) -> Reward:
    made = build("rewards", {"name": name, **settings}, "rewards.0")
    assert isinstance(made, Reward)
    return made


REWARDS = (
    reward_of("jpeg"),
    reward_of("function", call="tests.runtime.test_engine:red", label="faulty"),
)


def started(cls: type, *arguments: Any) -> Any:
    """An actor that Ray restarts."""
    import ray

    from rlalign.runtime.actors import RESTART

    return ray.remote(num_cpus=0, **RESTART)(cls).remote(*arguments)


def policy_worker(rewards: Any = None) -> Any:
    """A worker of the toy denoiser, with the rewards that its pieces ask."""
    from rlalign.runtime.workers import PolicySource, PolicyWorker

    model = Model(title="toy", recipe=DoubleToy())
    return started(
        PolicyWorker, PolicySource(model=model, runtime=RUNTIME, rewards=rewards), "rollout 0"
    )


@pytest.fixture(scope="module")
def members(ray_cluster: None) -> dict[Role, list[Any]]:
    """Role -> workers: one of a policy, which asks one of each reward."""
    from rlalign.runtime.rewards import RewardActors
    from rlalign.runtime.workers import RewardWorker

    rewards = {r.title: [started(RewardWorker, r, "cpu", 1, r.title)] for r in REWARDS}
    asked = RewardActors(rewards=REWARDS, held_out=(), actors=rewards, runtime=RUNTIME)
    return {
        ROLLOUT: [policy_worker(asked)],
        **{reward_role(t): some for t, some in rewards.items()},
    }


def on_pools(members: dict[Role, list[Any]], scene: Callable[[Any], Any], **settings: Any) -> Any:
    """What a scene on the pools gives."""
    from rlalign.runtime.engine import Pools

    async def whole() -> Any:
        pools = Pools(RUNTIME, members, **settings)
        await pools.adopt({role: dict(enumerate(some)) for role, some in members.items()})
        return await scene(pools)

    return asyncio.run(whole())


async def fetched(parts: Sequence[Any], done: WorkResult) -> tuple[list[Any], WorkResult]:
    """The parts of a result, and the rest of it."""
    return [await part for part in parts], done


@pytest.mark.promise
def test_a_unit_is_made_under_its_weights_which_travel_once(ray_cluster: None) -> None:
    """Bit for bit a rollout of this process, also by a worker that has died and lost them."""
    from rlalign.runtime.weights import Rows, WeightsRef, publish

    actor = policy_worker()
    policy = DoubleToy(seed=5).load("cpu")
    rows = Rows.of(policy.weights())
    first, second, third = make_units(3)

    async def scene(pools: Any) -> tuple[list[Any], int]:
        manifests = (publish(rows[:1]), publish(rows[1:], limit=256))  # as of two processes
        weights = WeightsRef(tag=("current", 4), manifests=manifests)
        made = [await pools.do("one", Rollout(unit=first, version=4), fetched, weights)]

        # a worker that holds them is asked without them
        assert await actor.do.remote(Rollout(unit=first, version=4), ("current", 9)) == (None,) * 3
        *_, held = await actor.do.remote(Rollout(unit=first, version=4), ("current", 4))
        assert held is not None
        made.append(await pools.do("two", Rollout(unit=second, version=4), fetched, weights))

        # its next process holds none, though it was sent them
        os.kill(await actor.process_id.remote(), signal.SIGKILL)
        made.append(await pools.do("three", Rollout(unit=third, version=4), fetched, weights))
        return made, pools[ROLLOUT].restarts

    made, restarts = on_pools({ROLLOUT: [actor]}, scene)
    for unit, ((trajectory, samples), done) in zip((first, second, third), made, strict=True):
        expected, expected_media = rollout(policy, unit, 4)
        np.testing.assert_array_equal(trajectory.latents_BK1, expected.latents_BK1)
        np.testing.assert_array_equal(samples["media"], expected_media)
        assert trajectory.policy_version == 4
        assert done.value is None
        assert done.cost.denoiser_calls == len(unit.prompts) * unit.plan.steps
    assert restarts == 1


@pytest.mark.promise
@pytest.mark.parametrize("lost", [1, 2])
def test_a_result_that_is_lost_before_it_was_used_is_made_again(
    members: dict[Role, list[Any]], lost: int
) -> None:
    """``max_attempts`` times in all."""
    from rlalign.runtime.pool import ObjectGone

    retries = list[Role]()
    (unit,) = make_units(1)
    seen = list[np.ndarray]()

    async def use(parts: Sequence[Any], done: WorkResult) -> int:
        seen.append(await parts[0])
        if len(seen) <= lost:
            raise ObjectGone("its node is gone")
        return len(seen)

    async def scene(pools: Any) -> int:
        return await pools.do("a piece", Pictures(unit=unit, version=0), use)

    if lost == RUNTIME.max_attempts:
        with pytest.raises(ObjectGone, match="its node is gone"):
            on_pools(members, scene, again=retries.append)
    else:
        assert on_pools(members, scene, again=retries.append) == 2
    assert len(seen) == 2
    np.testing.assert_array_equal(*seen)
    assert retries == [ROLLOUT] * lost


@pytest.mark.promise
def test_pieces_that_ask_for_scores_are_those_of_one_process(
    members: dict[Role, list[Any]],
) -> None:
    """Latents of a policy in float64, scores, what they cost, and why one is missing."""
    from rlalign.runtime.engine import RayEngine

    (unit,) = make_units(1, per_unit=4)
    local = LocalEngine(DoubleToy().load("cpu"), [LiveRewards(REWARDS)], rows=3, parallel=False)
    remote = RayEngine(RUNTIME, members, unit, rows=3)

    def look(engine: Any, some: Unit) -> list[Any]:
        x = engine.begin(some)
        assert x.dtype == torch.float64
        return engine.each(some, lambda rows, cut: Look(unit=rows, x=x[cut], k=1, score=True))

    try:
        assert remote.latent_shape(Plan(steps=2)) == (2, 1, 1)
        twice = expand(unit, 2)
        views = [look(engine, twice) for engine in (local, remote)]
    finally:
        remote.close()
    for mine, theirs in zip(*views, strict=True):
        assert torch.equal(mine.clean, theirs.clean)
        assert torch.equal(mine.gaussian.mean, theirs.gaussian.mean)
        np.testing.assert_array_equal(mine.total_B, theirs.total_B)
    missing = sum(int(np.isnan(view.total_B).sum()) for view in views[1])
    assert missing == twice.prompts.count("a blue square") == remote.cost.missing_scores
    assert replace(local.cost, seconds=0.0) == replace(remote.cost, seconds=0.0)
    assert remote.cost.seconds > 0.0
    assert local.reason == remote.reason == "KeyError: 'no blue square'"


def test_a_failing_score_is_missing_or_fails_the_unit_as_the_asker_says(
    members: dict[Role, list[Any]],
) -> None:
    import ray

    from rlalign.runtime.pool import UnitFailed

    samples = {"media": np.full((2, 1, 3, 8, 8), 51, np.uint8)}
    prompts = ("a red circle", "a blue square")
    retries = list[Role]()

    async def scene(pools: Any) -> Any:
        found = await pools.score(["jpeg", "faulty"], ray.put(samples), prompts, drop=True)
        with pytest.raises(UnitFailed) as caught:
            await pools.score(["jpeg", "faulty"], ray.put(samples), prompts, unit="train/1/7")
        return found, str(caught.value)

    found, message = on_pools(members, scene, again=retries.append)
    assert list(found) == ["jpeg", "faulty"]
    np.testing.assert_allclose(found["faulty"].score_B, [0.2, np.nan], rtol=1e-6)
    assert np.isfinite(found["jpeg"].score_B).all()
    assert (found["jpeg"].reason, found["faulty"].reason) == ("", "KeyError: 'no blue square'")
    assert message.startswith("reward faulty of unit train/1/7 failed on 2 attempts")
    assert "no blue square" in message
    assert retries == [FAULTY]


@pytest.mark.promise
def test_an_engine_begins_where_every_role_has_a_worker(members: dict[Role, list[Any]]) -> None:
    """And ends with what the reward's worker says, before any piece waits for it."""
    from rlalign.runtime.engine import RayEngine
    from rlalign.runtime.workers import RewardWorker

    worker = started(RewardWorker, Refused(name="refused"), "cpu", 1, "reward refused")
    (unit,) = make_units(1)
    with pytest.raises(UserError, match="there is none; take another"):
        RayEngine(RUNTIME, {**members, reward_role("refused"): [worker]}, unit, rows=3)


# --- pieces that overlap -------------------------------------------------------------------------

LIMIT = 100.0
"""Seconds after which what never comes has failed; no outcome depends on it otherwise."""


def wait_for(file: Path) -> None:
    """Waits for a file that another piece, or a worker of a reward, makes."""
    deadline = time.monotonic() + LIMIT
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come meanwhile"
        time.sleep(0.005)


class MeetingFamily(ToyFamily):
    """The toy that leaves a file for each prompt that it reads, and for each that its denoiser is
    asked about; the denoiser of the first prompt waits for the words of the last."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        super().__init__()
        self._folder = folder
        self._prompts = prompts

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        for prompt in prompts:
            (self._folder / f"read {prompt}").touch()
        return super().encode(prompts, plan)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        known = super().encode(self._prompts).caption["embeds_BLD"]
        asked = next(
            p
            for p, row in zip(self._prompts, known, strict=True)
            if torch.equal(row, words["embeds_BLD"][0])
        )
        if asked == self._prompts[0]:
            wait_for(self._folder / f"read {self._prompts[-1]}")
        (self._folder / f"asked {asked}").touch()
        return super().predict(x, timestep_B, words)


class MeetingToy(Toy):
    """Its recipe. Source: none, a test's own."""

    folder: str = ""
    prompts: tuple[str, ...] = ()

    def build(self, device: str) -> ToyFamily:
        return MeetingFamily(Path(self.folder), self.prompts)


class MeetingReward(Reward):
    """The red of each picture, once the denoiser is asked about another prompt. Source: none, a
    test's own."""

    file: str = ""

    def load(self, device: str) -> Scorer:
        def score(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            wait_for(Path(self.file))
            return media_BFCHW[:, :, 0].mean((1, 2, 3))

        return score


@pytest.mark.promise
def test_one_worker_makes_the_next_piece_while_one_waits(ray_cluster: None, tmp_path: Path) -> None:
    """The denoiser of the first piece waits until the second one's words are read, and its score
    until the denoiser is asked for the second: both would hang where pieces do not overlap. Values
    and costs are those of one process."""
    import ray

    from rlalign.runtime.actors import create_reward_worker
    from rlalign.runtime.engine import RayEngine
    from rlalign.runtime.groups import create_policy_worker
    from rlalign.runtime.rewards import RewardActors
    from rlalign.runtime.workers import PolicySource

    first, second = make_units(2, per_unit=1)
    prompts = (*first.prompts, *second.prompts)
    recipe = MeetingToy(folder=str(tmp_path), prompts=prompts)
    reward = MeetingReward(file=str(tmp_path / f"asked {prompts[-1]}"))
    scorer = create_reward_worker("meeting", 0, reward, RUNTIME, counts=False)
    asked = RewardActors(
        rewards=(reward,), held_out=(), actors={reward.title: [scorer]}, runtime=RUNTIME
    )
    model = Model(title="meeting", recipe=recipe)
    source = PolicySource(model=model, runtime=RUNTIME, rewards=asked)
    worker = create_policy_worker("meeting", 0, source, counts=False)

    x = torch.full((1, 2, 1, 1), 0.3)
    works = [Look(unit=unit, x=x, k=1, score=True) for unit in (first, second)]
    engine = RayEngine(
        RUNTIME, {ROLLOUT: [worker], reward_role(reward.title): [scorer]}, first, rows=1
    )
    try:
        (tmp_path / f"read {prompts[-1]}").unlink(missing_ok=True)
        found = engine.perform(works)
    finally:
        engine.close()
        ray.kill(worker)
        ray.kill(scorer)
    alone = LocalEngine(ToyPolicy(), [LiveRewards([reward])], rows=1, parallel=False).perform(works)
    for mine, other in zip(found, alone, strict=True):
        assert torch.equal(mine.value.clean, other.value.clean)
        np.testing.assert_array_equal(mine.value.total_B, other.value.total_B)
        assert replace(mine.cost, seconds=0.0) == replace(other.cost, seconds=0.0)
