"""The coordinator as a plain object, before workers that only pretend: what it counts, what it
says, what outlives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.config import Run
from rlalign.core.records import Unit
from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from tests.runs import small_run

pytestmark = pytest.mark.ray

TAG = ("current", 3)


@pytest.fixture(scope="module")
def members(ray_cluster: None) -> dict[Role, Any]:
    """Role -> two rollout workers and a reward worker that answer at once, or as slowly as they
    were told."""
    import ray

    class Pretender:
        seconds = 0.0

        def ping(self) -> str:
            return "pong"

        def take(self, seconds: float) -> None:
            self.seconds = seconds

        def do(self, work: Any, tag: Any, *manifests: Any) -> tuple[Any, Any, Any]:
            time.sleep(self.seconds)
            media = np.zeros((len(work.unit.prompts), 1, 3, 8, 8), np.uint8)
            return None, media, ({"seconds": self.seconds}, "")

        def score(self, media: Any, prompts: Sequence[str], *_: Any) -> tuple[Any, float]:
            time.sleep(self.seconds)
            return np.zeros(len(prompts), np.float32), self.seconds

    make = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Pretender)
    return {
        ROLLOUT: {n: make.remote() for n in range(2)},
        reward_role("shapes"): {0: make.remote()},
    }


def slowed(
    members: dict[Role, Any], *, rollout: float = 0.0, score: float = 0.0, rollouts: int = 1
) -> dict[Role, Any]:
    """So many of the rollout workers, and seconds that a unit takes."""
    import ray

    some = {n: a for n, a in members[ROLLOUT].items() if n < rollouts}
    ray.get(
        [a.take.remote(rollout) for a in some.values()]
        + [members[reward_role("shapes")][0].take.remote(score)]
    )
    return {**members, ROLLOUT: some}


def units(run: Run) -> list[Unit]:
    return run.prompts.units(run.seed, 1, run.plan)


async def round_of(coordinator: Any, learner: str, work: Sequence[Unit]) -> None:
    """A learner that has just started orders a round and takes all of it."""
    import ray

    await coordinator.begin(learner)
    await coordinator.order(learner, 1, list(work), TAG, [ray.put({})])
    have = 0
    while have < len(work):
        have += len(await coordinator.gather(learner, 1, have, 1))


@pytest.mark.promise
def test_samples_are_counted_when_they_are_there_and_once(members: dict[Role, Any]) -> None:
    """A learner that was killed orders its round again under the same weights: the same samples."""
    from rlalign.runtime.training.coordinator import Coordinator

    run = small_run("rewards=[{name: shapes}]")

    async def scene() -> list[int]:
        coordinator, counts = Coordinator(run), []
        await coordinator.adopt(slowed(members), None)
        counts.append((await coordinator.standing()).samples)
        for learner in ("first", "second"):
            await round_of(coordinator, learner, units(run))
            counts.append((await coordinator.standing()).samples)
        return counts

    assert asyncio.run(scene()) == [0, run.samples_per_round, run.samples_per_round]


def test_what_was_ordered_and_dropped_is_not_counted(members: dict[Role, Any]) -> None:
    import ray

    from rlalign.runtime.training.coordinator import Coordinator

    run = small_run("rewards=[{name: shapes}]")

    async def scene() -> int:
        coordinator = Coordinator(run)
        await coordinator.adopt(slowed(members, rollout=0.5), None)
        await coordinator.begin("first")
        await coordinator.order("first", 1, units(run), TAG, [ray.put({})])
        await coordinator.begin("second")
        return (await coordinator.standing()).samples

    assert asyncio.run(scene()) == 0


@pytest.mark.promise
def test_a_new_coordinator_counts_on(members: dict[Role, Any]) -> None:
    from rlalign.runtime.training.coordinator import Coordinator

    run = small_run("rewards=[{name: shapes}]")

    async def scene() -> None:
        first, second, some = Coordinator(run), Coordinator(run), slowed(members)
        await first.adopt(some, None)
        first._production.pools[ROLLOUT].restarts = 5  # as if so many had been killed
        await round_of(first, "learner", units(run))
        said = await first.standing()
        with pytest.raises(TimeoutError):  # it does not say 0 before it was told
            await asyncio.wait_for(second.facts(), timeout=0.2)
        for _ in range(2):  # the driver may tell twice
            await second.adopt(some, said)
        facts, now = await second.facts(), await second.standing()
        assert facts["restarts/rollout"] == now.pools[ROLLOUT].restarts == 5
        assert (now.samples, now.handled_bytes) == (run.samples_per_round, said.handled_bytes)
        assert facts["driver_bytes_per_sample"] == pytest.approx(
            said.handled_bytes / run.samples_per_round, abs=0.1
        )

    asyncio.run(scene())


@pytest.mark.promise
def test_how_long_a_worker_of_each_pool_worked(members: dict[Role, Any]) -> None:
    """Four units of 0.1 s on two rollout workers, scored in 0.2 s each by one: 0.2 and 0.8 s a
    worker."""
    from rlalign.runtime.training.coordinator import Coordinator

    run = small_run("rewards=[{name: shapes}]")

    async def scene() -> list[dict[str, float]]:
        coordinator = Coordinator(run)
        await coordinator.adopt(slowed(members, rollout=0.1, score=0.2, rollouts=2), None)
        while (await coordinator.standing()).pools[ROLLOUT].ready < 2:
            await asyncio.sleep(0.05)
        await round_of(coordinator, "learner", units(run))
        return [await coordinator.facts(), await coordinator.facts()]

    now, then = asyncio.run(scene())
    assert now["seconds/worked/rollout"] == pytest.approx(len(units(run)) * 0.1 / 2)
    assert now["seconds/worked/reward/shapes"] == pytest.approx(len(units(run)) * 0.2)
    assert then["seconds/worked/rollout"] == 0.0, "since it was last asked"


def test_a_learner_hears_that_there_is_nothing_yet(
    members: dict[Role, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long units take: its patience is for a coordinator that does not answer."""
    import ray

    from rlalign.runtime.training import coordinator as module

    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    run = small_run("rewards=[{name: shapes}]")

    async def scene() -> list[int]:
        coordinator = module.Coordinator(run)
        await coordinator.adopt(slowed(members, rollout=0.5), None)
        await coordinator.begin("learner")
        await coordinator.order("learner", 1, units(run)[:1], TAG, [ray.put({})])
        found: list[int] = []
        while not found or not found[-1]:
            answer: Any = await coordinator.gather("learner", 1, 0, 1)
            found.append(len(answer))
        return found

    counts = asyncio.run(scene())
    assert counts[0] == 0
    assert counts[-1] == 1


@pytest.mark.slow
def test_the_dashboard_shows_what_real_workers_do(ray_cluster: None) -> None:
    """Spans of the timeline and lines of the workers' logs, by unit, weights and reward."""
    import ray

    from rlalign.runtime.training.coordinator import Coordinator
    from rlalign.runtime.training.fleet import policy_source
    from rlalign.runtime.workers import PolicyWorker, RewardWorker

    run = small_run("rewards=[{name: jpeg}]", "plan.steps=1", "runtime.rollout.workers=1")
    reward = run.rewards[0]
    real = {
        ROLLOUT: {0: ray.remote(num_cpus=0)(PolicyWorker).remote(policy_source(run), "rollout 0")},
        reward_role("jpeg"): {
            0: ray.remote(num_cpus=0)(RewardWorker).remote(reward, "cpu", 1, "reward jpeg 0")
        },
    }

    async def scene() -> None:
        from rlalign.policies.tiny import Tiny
        from rlalign.runtime.weights import Rows, publish

        coordinator = Coordinator(run)
        await coordinator.adopt(real, None)
        weights = publish(Rows.of(Tiny().load("cpu").weights()))
        await coordinator.begin("learner")
        await coordinator.order("learner", 1, units(run)[:1], TAG, [weights])
        while not (
            found := await coordinator.gather("learner", 1, 0, 1)
        ):  # none of them for now, on a busy machine
            await asyncio.sleep(0.1)
        assert len(found) == 1  # type: ignore[arg-type]

    asyncio.run(scene())
    wanted = {"train/1/0 under current v3", "jpeg of train/1/0"}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    spans, lines = set[str](), set[str]()
    while not (
        wanted <= spans and wanted <= lines
    ):  # Ray's workers tell once a second; the test's own time limit ends a hang
        time.sleep(0.2)
        spans = {str(event["cat"]) for event in ray.timeline()}
        lines = {line for log in logs.glob("worker-*.out") for line in log.read_text().splitlines()}


def test_parts_of_weights_are_given_out_once_every_learner_has_given_its_own() -> None:
    """Of the learners at work: what one that was replaced has published is no part."""
    from rlalign.runtime.training.coordinator import Coordinator

    coordinator: Any = Coordinator(small_run())

    async def scene() -> list[str]:
        await coordinator.begin("group")
        asked = asyncio.ensure_future(coordinator.take_parts("group", TAG, 2))
        for incarnation, learner, part in (
            ("group", "main", "first rows"),
            ("replaced", "other", "rows of before"),
            ("group", "main", "first rows again"),
        ):
            await coordinator.give_part(incarnation, TAG, learner, [part])
            await asyncio.sleep(0)
            assert not asked.done()
        await coordinator.give_part("group", TAG, "other", ["last rows"])
        return await asked

    assert asyncio.run(scene()) == ["first rows again", "last rows"]
