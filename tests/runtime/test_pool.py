"""The pool on real actors: hands out, recovers a killed one, and says when none will come back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.ray


def members(count: int, **options: Any) -> list[Any]:
    import ray

    from rlalign.runtime.workers import Worker

    return [ray.remote(num_cpus=1, max_restarts=-1, **options)(Worker).remote() for _ in range(count)]


def test_an_actor_is_handed_out_once(ray_cluster: None) -> None:
    from rlalign.runtime.pool import Pool

    async def scene() -> list[int]:
        pool = Pool("test", members(2), patience_seconds=10)
        first, _ = await pool.acquire()
        second, _ = await pool.acquire()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.acquire(), timeout=0.3)
        pool.release(first)
        again, _ = await pool.acquire()
        return [first, second, again]

    first, second, again = asyncio.run(scene())
    assert {first, second} == {0, 1}
    assert again == first


def test_a_killed_actor_comes_back_and_is_counted(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.pool import Pool

    async def scene() -> tuple[int, int, int]:
        pool = Pool("test", members(1), patience_seconds=60)
        actor_id, actor = await pool.acquire()
        before = await actor.process_id.remote()
        os.kill(before, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await actor.process_id.remote()
        pool.lost(actor_id, RuntimeError("killed"))
        _, actor = await asyncio.wait_for(pool.acquire(), timeout=60)
        return before, await actor.process_id.remote(), pool.restarts

    before, after, restarts = asyncio.run(scene())
    assert before != after
    assert restarts == 1


def test_a_pool_whose_actors_cannot_start_is_lost_with_their_own_error(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.pool import Pool, PoolLost
    from rlalign.runtime.workers import Worker

    class Stillborn(Worker):
        def __init__(self) -> None:
            raise ValueError("no such checkpoint on this node")

    async def scene() -> None:
        pool = Pool("test", [ray.remote(num_cpus=1, max_restarts=-1)(Stillborn).remote()], patience_seconds=30)
        await asyncio.wait_for(pool.acquire(), timeout=60)

    with pytest.raises(PoolLost, match="no such checkpoint on this node"):
        asyncio.run(scene())


def test_it_grows_and_shrinks_while_its_actors_work(ray_cluster: None) -> None:
    from rlalign.runtime.pool import Pool

    async def scene() -> None:
        actors = dict(enumerate(members(3)))
        pool = Pool("test", patience_seconds=10)
        pool.adopt({0: actors[0]})
        first, handle = await pool.acquire()
        assert handle is actors[0]
        waiting = asyncio.ensure_future(pool.acquire())
        pool.adopt(actors)
        second, _ = await asyncio.wait_for(waiting, timeout=60)
        assert second != first
        pool.adopt({2: actors[2]})
        assert pool.numbers() == {0, 1, 2} or pool.numbers() == {0, 2}, "one that works stays until it is released"
        pool.release(first)
        pool.release(second)
        assert pool.numbers() == {2}
        last, handle = await asyncio.wait_for(pool.acquire(), timeout=60)
        assert handle is actors[2]
        assert pool.state().busy == 1
        pool.release(last)

    asyncio.run(scene())


def test_one_that_waits_for_a_place_does_not_hold_up_the_others(ray_cluster: None) -> None:
    """Eight places, an actor that wants a hundred: pending demand, which the pool counts as starting."""
    import ray

    from rlalign.runtime.pool import Pool
    from rlalign.runtime.workers import Worker

    async def scene() -> None:
        giant = ray.remote(num_cpus=100, max_restarts=-1)(Worker).remote()
        pool = Pool("test", [giant, *members(1)], patience_seconds=10)
        for _ in range(3):
            actor_id, actor = await asyncio.wait_for(pool.acquire(), timeout=60)
            assert await actor.ping.remote() == "pong"
            pool.release(actor_id)
        assert (pool.state().ready, pool.state().starting, pool.state().lost) == (1, 1, 0)
        ray.kill(giant)

    asyncio.run(scene())


def test_nobody_starting_in_time_says_so(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.pool import Pool, PoolLost
    from rlalign.runtime.workers import Worker

    giant = ray.remote(num_cpus=100, max_restarts=-1)(Worker).remote()

    async def scene() -> None:
        pool = Pool("test", [giant], patience_seconds=10, start_seconds=0.5)
        await asyncio.wait_for(pool.acquire(), timeout=60)

    with pytest.raises(PoolLost, match=r"did not start in 0\.5 s"):
        asyncio.run(scene())
    ray.kill(giant)


# --- how long a call may take -----------------------------------------------------------------------------------------------


def sleepers(count: int) -> list[Any]:
    """Actors whose call sleeps and answers with their process."""
    import ray

    from rlalign.runtime.workers import Worker

    class Sleeper(Worker):
        def nap(self, seconds: float) -> int:
            time.sleep(seconds)
            return os.getpid()

    return [ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(Sleeper).remote() for _ in range(count)]


def test_a_call_that_waits_behind_another_has_not_begun(ray_cluster: None) -> None:
    """Three naps of 0.8 s one after another on one worker: none takes longer than 1.2 s, the last one is there after 2.4 s."""
    from rlalign.config.settings import RuntimeSettings
    from rlalign.runtime.pool import Pool, tried

    runtime = RuntimeSettings(unit_timeout_seconds=1.2, max_attempts=1)

    async def scene() -> tuple[set[int], int]:
        pool = Pool("test", sleepers(1), patience_seconds=10, in_flight=2)

        def call(actor: Any) -> Any:
            return pool.answer(actor, actor.nap.remote(0.8), runtime.unit_timeout_seconds)

        naps = [tried(f"nap {i}", pool, call, runtime) for i in range(3)]
        return set(await asyncio.gather(*naps)), pool.restarts

    processes, restarts = asyncio.run(scene())
    assert len(processes) == 1
    assert restarts == 0


def test_a_worker_that_hangs_is_replaced_also_where_nobody_waits_for_it_any_more(ray_cluster: None) -> None:
    """The first call's learner has gone away; the one behind it still may not wait for ever."""
    from rlalign.config.settings import RuntimeSettings
    from rlalign.runtime.pool import Pool, tried

    runtime = RuntimeSettings(unit_timeout_seconds=1.0, max_attempts=2)

    async def scene() -> tuple[int, int]:
        pool = Pool("test", sleepers(1), patience_seconds=30, in_flight=2)

        def nap(seconds: float) -> Any:
            return lambda actor: pool.answer(actor, actor.nap.remote(seconds), runtime.unit_timeout_seconds)

        process = await tried("first", pool, nap(0.0), runtime)
        hangs = asyncio.ensure_future(tried("hangs", pool, nap(3600), runtime))
        await asyncio.sleep(0.2)
        hangs.cancel()
        after = await asyncio.wait_for(tried("after", pool, nap(0.0), runtime), timeout=30)
        assert after != process
        return pool.restarts, len(pool._last)

    assert asyncio.run(scene()) == (1, 0)


def test_a_call_that_ends_its_process_on_every_attempt_fails_and_says_how(ray_cluster: None) -> None:
    from rlalign.config.settings import RuntimeSettings
    from rlalign.runtime.pool import Pool, UnitFailed, tried

    runtime = RuntimeSettings(max_attempts=2)
    retries: list[str] = []

    async def scene() -> str:
        pool = Pool("test", members(1), patience_seconds=60)

        def call(actor: Any) -> Any:
            return pool.answer(actor, actor.apply.remote(lambda worker: os._exit(7)), runtime.unit_timeout_seconds)

        with pytest.raises(UnitFailed) as caught:
            await tried("unit 5", pool, call, runtime, lambda: retries.append("again"))
        return str(caught.value)

    message = asyncio.run(scene())
    assert message.startswith("unit 5 failed on 2 attempts (runtime.max_attempts)")
    assert "its process died at work" in message
    assert retries == ["again"]
