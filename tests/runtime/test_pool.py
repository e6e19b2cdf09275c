"""The pool on real actors: hands out, recovers a killed one, and says when none will come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlalign.runtime.roles import plain_role

pytestmark = pytest.mark.ray


def plain_worker() -> type:
    """What a pool asks of an actor, in a class that travels whole, so that the actor's process has
    neither rlalign nor torch to import."""

    class Plain:
        def ping(self) -> str:
            return "pong"

        def process_id(self) -> int:
            return os.getpid()

        def apply(self, function: Any) -> Any:
            return function(self)

    return Plain


def members(count: int) -> list[Any]:
    import ray

    kind = ray.remote(num_cpus=1, max_restarts=-1)(plain_worker())
    return [kind.remote() for _ in range(count)]


def test_an_actor_is_handed_out_once(ray_cluster: None) -> None:
    from rlalign.runtime.pool import Pool

    async def scene() -> list[int]:
        pool = Pool(plain_role("test"), members(2), start_seconds=3600)
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
        pool = Pool(plain_role("test"), members(1), start_seconds=3600)
        actor_id, actor = await pool.acquire()
        before = await actor.process_id.remote()
        os.kill(before, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            await actor.process_id.remote()
        pool.lost(actor_id, RuntimeError("killed"))
        assert (pool.state().ready, pool.state().lost, pool.state().busy) == (0, 1, 0)
        _, actor = await pool.acquire()
        return before, await actor.process_id.remote(), pool.restarts

    before, after, restarts = asyncio.run(scene())
    assert before != after
    assert restarts == 1


@pytest.mark.promise
def test_a_mistake_of_the_user_that_keeps_actors_from_starting_is_raised_as_it_is(
    ray_cluster: None,
) -> None:
    import ray

    from rlalign.core.finite import NotFinite
    from rlalign.core.registry import UserError
    from rlalign.runtime.pool import Pool
    from rlalign.runtime.workers import Worker

    class Refuses(Worker):
        def __init__(self, part: str) -> None:
            raise NotFinite(f"policy: the weights of its {part} must be finite")

    async def scene() -> None:
        actors = [ray.remote(num_cpus=1, max_restarts=-1)(Refuses).remote("unet") for _ in range(2)]
        pool = Pool(plain_role("test"), actors, start_seconds=3600)
        await pool.acquire()

    with pytest.raises(UserError, match=r"^policy: the weights of its unet must be finite$"):
        asyncio.run(scene())


@pytest.mark.promise
def test_a_pool_whose_actors_cannot_start_is_lost_with_their_own_error(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.pool import Pool, PoolLost

    class Stillborn(plain_worker()):
        def __init__(self) -> None:
            raise ValueError("no such checkpoint on this node")

    async def scene() -> None:
        pool = Pool(
            plain_role("test"),
            [ray.remote(num_cpus=1, max_restarts=-1)(Stillborn).remote()],
            start_seconds=3600,
        )
        await pool.acquire()

    with pytest.raises(
        PoolLost, match=r"\(1 died for good\)(.|\n)*no such checkpoint on this node"
    ):
        asyncio.run(scene())


@pytest.mark.promise
def test_it_grows_and_shrinks_while_its_actors_work(ray_cluster: None) -> None:
    from rlalign.runtime.pool import Pool

    async def scene() -> None:
        actors = dict(enumerate(members(3)))
        pool = Pool(plain_role("test"), start_seconds=3600)
        pool.adopt({0: actors[0]})
        first, handle = await pool.acquire()
        assert handle is actors[0]
        waiting = asyncio.ensure_future(pool.acquire())
        pool.adopt(actors)
        second, _ = await waiting
        assert second != first
        pool.adopt({2: actors[2]})
        assert pool.numbers() == {0, 1, 2} or pool.numbers() == {0, 2}, (
            "one that works stays until it is released"
        )
        pool.release(first)
        pool.release(second)
        assert pool.numbers() == {2}
        last, handle = await pool.acquire()
        assert handle is actors[2]
        assert pool.state().busy == 1
        pool.release(last)

    asyncio.run(scene())


def test_one_that_waits_for_a_place_does_not_hold_up_the_others(ray_cluster: None) -> None:
    """Eight places, an actor that wants a hundred: pending demand, which the pool counts as
    starting."""
    import ray

    from rlalign.runtime.pool import Pool

    async def scene() -> None:
        giant = ray.remote(num_cpus=100, max_restarts=-1)(plain_worker()).remote()
        pool = Pool(plain_role("test"), [giant, *members(1)], start_seconds=3600)
        for _ in range(3):
            actor_id, actor = await pool.acquire()
            assert await actor.ping.remote() == "pong"
            pool.release(actor_id)
        assert (pool.state().ready, pool.state().starting, pool.state().lost) == (1, 1, 0)
        ray.kill(giant)

    asyncio.run(scene())


def test_nobody_starting_in_time_says_so(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rlalign.runtime import pool as module

    monkeypatch.setattr(module, "PING_SECONDS", 1.0)
    giant = ray.remote(num_cpus=100, max_restarts=-1)(plain_worker()).remote()

    async def scene() -> None:
        pool = module.Pool(plain_role("test"), [giant], start_seconds=0.5)
        await pool.acquire()

    with pytest.raises(
        module.PoolLost, match=r"\(1 did not start in 0\.5 s: raise runtime\.start_seconds\)"
    ):
        asyncio.run(scene())
    ray.kill(giant)


def slow(folder: Path) -> Any:
    """An actor that begins its second life when a file is there, and dies of a ping while another
    one is."""
    import ray

    class Slow(plain_worker()):
        def __init__(self, folder: Path) -> None:
            self._folder = folder
            while (folder / "begun").exists() and not (folder / "again").exists():
                time.sleep(0.02)
            (folder / "begun").touch()

        def ping(self) -> str:
            if (self._folder / "dies").exists():
                (self._folder / "dies").unlink()
                os._exit(7)
            return "pong"

    return ray.remote(num_cpus=1, max_restarts=-1)(Slow).remote(folder)


async def answers(actor: Any) -> None:
    """Asks one again and again; raises what it died of."""
    while True:
        await actor.ping.remote()


@pytest.mark.promise
def test_nobody_coming_back_in_time_says_so(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rlalign.runtime import pool as module

    actor = slow(tmp_path)

    async def scene() -> None:
        pool = module.Pool(plain_role("test"), [actor], start_seconds=3600)
        number, _ = await pool.acquire()
        monkeypatch.setattr(pool, "_start", 0.5)
        monkeypatch.setattr(module, "PING_SECONDS", 1.0)
        ray.kill(actor, no_restart=False)
        with pytest.raises(ray.exceptions.RayActorError):
            await answers(actor)
        pool.lost(number, RuntimeError("killed"))
        await pool.acquire()

    said = r"\(1 did not come back in 0\.5 s: raise runtime\.start_seconds\); .* said: killed"
    with pytest.raises(module.PoolLost, match=said):
        asyncio.run(scene())
    ray.kill(actor)


def test_an_answer_of_before_a_rest_of_the_loop_says_nothing_of_now(
    ray_cluster: None, tmp_path: Path
) -> None:
    """As in a policy worker, whose loop runs while it asks a reward: the member died of what was
    asked before the rest, and has long been back."""
    import ray

    from rlalign.runtime.pool import Pool

    for file in ("again", "dies"):
        (tmp_path / file).touch()
    actor = slow(tmp_path)
    loop = asyncio.new_event_loop()

    async def begin() -> Pool:
        pool = Pool(plain_role("test"), [actor], start_seconds=0.01)
        await asyncio.sleep(0)
        return pool

    pool = loop.run_until_complete(begin())
    while (tmp_path / "dies").exists():
        time.sleep(0.02)
    answer = ""
    while not answer:
        with contextlib.suppress(ray.exceptions.RayActorError):
            answer = ray.get(actor.ping.remote())
    number, _ = loop.run_until_complete(pool.acquire())
    assert number == 0
    loop.close()


# --- how long a call may take --------------------------------------------------------------------


def gated(count: int, **options: Any) -> list[Any]:
    """Actors whose call says in a file that it has begun, waits until another file is there, and
    answers with its process."""
    import ray

    class Gated(plain_worker()):
        def work(self, begun: Path, until: Path | None = None) -> int:
            begun.touch()
            while until is not None and not until.exists():
                time.sleep(0.02)
            return os.getpid()

    kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, **options)(Gated)
    return [kind.remote() for _ in range(count)]


async def there(file: Path) -> None:
    """Waits for a file; the test's own time limit ends a hang."""
    while not file.exists():
        await asyncio.sleep(0.02)


def test_a_call_that_waits_behind_another_has_not_begun(ray_cluster: None, tmp_path: Path) -> None:
    """The second waits behind the first for longer, by the loop's clock, than it may take itself,
    and is not late."""
    from rlalign.config import RuntimeSettings
    from rlalign.runtime.pool import Pool, call_with_retries

    seconds = 3600.0
    runtime = RuntimeSettings(max_attempts=1)
    gate = tmp_path / "gate"

    async def scene() -> tuple[set[int], int]:
        pool = Pool(plain_role("test"), gated(1), start_seconds=3600, in_flight=2)

        def call(name: str, limit: float, until: Path | None) -> Any:
            def work(actor: Any) -> Any:
                return pool.answer(actor, actor.work.remote(tmp_path / name, until), limit)

            return asyncio.ensure_future(call_with_retries(name, pool, work, runtime))

        first = call("first", 10 * seconds, gate)
        await there(tmp_path / "first")
        second = call("second", seconds, None)
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        clock = loop.time
        loop.time = lambda: clock() + 2 * seconds
        await asyncio.sleep(0.1)
        gate.touch()
        return {await first, await second}, pool.restarts

    processes, restarts = asyncio.run(scene())
    assert len(processes) == 1
    assert restarts == 0


def test_a_call_may_be_answered_before_one_that_was_given_earlier(
    ray_cluster: None, tmp_path: Path
) -> None:
    """By an actor of several threads, whose first call waits for something else."""
    from rlalign.runtime.pool import Pool

    gate = tmp_path / "gate"

    async def scene() -> tuple[int, int, int]:
        actors = gated(1, max_concurrency=2)
        pool = Pool(plain_role("test"), actors, start_seconds=3600, in_flight=2)
        (actor,) = actors
        await pool.acquire()
        waits = asyncio.ensure_future(
            pool.answer(actor, actor.work.remote(tmp_path / "first", gate), 3600.0)
        )
        await there(tmp_path / "first")
        second = await pool.answer(actor, actor.work.remote(tmp_path / "second"), 3600.0)
        assert not waits.done()
        gate.touch()
        return second, await waits, sum(len(m.unanswered) for m in pool._members.values())

    second, first, left = asyncio.run(scene())
    assert second == first
    assert left == 0


@pytest.mark.promise
def test_a_worker_that_hangs_is_replaced_also_where_nobody_waits_for_it_any_more(
    ray_cluster: None, tmp_path: Path
) -> None:
    """The first call's learner has gone away; the one behind it still may not wait for ever."""
    from rlalign.config import RuntimeSettings
    from rlalign.runtime.pool import Pool, call_with_retries

    runtime = RuntimeSettings(max_attempts=2)

    async def scene() -> tuple[int, int]:
        pool = Pool(plain_role("test"), gated(1), start_seconds=3600, in_flight=2)

        def work(name: str, limit: float, until: Path | None = None) -> Any:
            return lambda actor: pool.answer(
                actor, actor.work.remote(tmp_path / name, until), limit
            )

        process = await call_with_retries("first", pool, work("first", 3600.0), runtime)
        hanging = work("hangs", 1.0, tmp_path / "never")
        hangs = asyncio.ensure_future(call_with_retries("hangs", pool, hanging, runtime))
        await there(tmp_path / "hangs")
        hangs.cancel()
        # behind the one that hangs, and then at a fresh process
        limits = iter([1.0, 3600.0])
        after = await call_with_retries(
            "after", pool, lambda actor: work("after", next(limits))(actor), runtime
        )
        assert after != process
        return pool.restarts, sum(len(m.unanswered) for m in pool._members.values())

    assert asyncio.run(scene()) == (1, 0)


@pytest.mark.promise
def test_a_call_that_ends_its_process_on_every_attempt_fails_and_says_how(
    ray_cluster: None,
) -> None:
    from rlalign.config import RuntimeSettings
    from rlalign.runtime.pool import Pool, UnitFailed, call_with_retries

    runtime = RuntimeSettings(max_attempts=2)
    retries: list[str] = []

    async def scene() -> str:
        pool = Pool(plain_role("test"), members(1), start_seconds=3600)

        def call(actor: Any) -> Any:
            return pool.answer(
                actor, actor.apply.remote(lambda worker: os._exit(7)), runtime.unit_timeout_seconds
            )

        with pytest.raises(UnitFailed) as caught:
            await call_with_retries("unit 5", pool, call, runtime, lambda: retries.append("again"))
        return str(caught.value)

    message = asyncio.run(scene())
    assert message.startswith("unit 5 failed on 2 attempts (runtime.max_attempts)")
    assert "its process died at work" in message
    assert retries == ["again"]


@pytest.mark.promise
def test_what_a_call_had_tried_often_enough_is_not_tried_once_more(ray_cluster: None) -> None:
    """A piece of work whose question to a reward failed on every attempt fails with it, at once."""
    from rlalign.config import RuntimeSettings
    from rlalign.runtime.pool import Pool, PoolLost, UnitFailed, call_with_retries

    runtime = RuntimeSettings(max_attempts=3)
    retries: list[str] = []

    async def scene(kind: type[Exception]) -> str:
        pool = Pool(plain_role("test"), members(1), start_seconds=3600)

        def fail(worker: Any) -> None:
            raise kind("reward x of a piece of work failed on 3 attempts")

        def call(actor: Any) -> Any:
            return pool.answer(actor, actor.apply.remote(fail), runtime.unit_timeout_seconds)

        with pytest.raises(kind) as caught:
            await call_with_retries("piece 1", pool, call, runtime, lambda: retries.append("again"))
        return str(caught.value)

    for kind in (UnitFailed, PoolLost):
        message = asyncio.run(scene(kind))
        assert message == "reward x of a piece of work failed on 3 attempts"
    assert retries == []
