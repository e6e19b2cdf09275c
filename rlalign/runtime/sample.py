"""Sampling on Ray: pieces of work on the rollout pool, rewards asked in the reward pools.

    driver: the method --pieces--> rollout pool --pictures--> reward pools
                ^------- values and costs -------'   (scores, or gradients of the pictures)

The driver decides and keeps the order; workers hold nothing of the run, so any of them may die: its piece is given out
again, and a question to a reward worker that died is asked again. Pieces are fixed and noise is keyed, so the pictures are
those of one process, bit for bit.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.config import RuntimeSettings
from rlalign.devices import usable
from rlalign.records import Plan
from rlalign.registry import UserError
from rlalign.rewards.base import Reward
from rlalign.runtime import cluster
from rlalign.runtime.fleet import RESTART, options
from rlalign.runtime.placement import ROLLOUT
from rlalign.runtime.pool import Pool, PoolLost, UnitFailed, tried
from rlalign.runtime.workers import Worker
from rlalign.sample import LiveRewards, Sample, perform, ready_policy, run_sample
from rlalign.sample.engine import Done, as_uint8
from rlalign.sample.stage import OnRecord
from rlalign.work import Engine, Scores, Work


class RewardLost(RuntimeError):
    """A reward's workers do not answer any more."""


class JudgeWorker(Worker):
    """Holds one reward's scorer; scores pictures, or differentiates their scores."""

    def __init__(self, reward: Reward, device: str, threads: int, label: str) -> None:
        torch.set_num_threads(threads)
        self.label, self._reward = label, reward
        self._rewards = LiveRewards([reward], scorers={reward.title: reward.load(usable(device, "runtime.device"))})

    def scores(self, media_BFCHW: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, str]:
        """(raw scores (B,) of uint8 media, what the scorer last said when it failed)."""
        pixels = torch.from_numpy(np.array(media_BFCHW)).float() / 255.0
        return self._rewards.scores(pixels, prompts).raw[self._reward.title], self._rewards.reason

    def gradient(self, media_BFCHW: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(raw scores (B,), d score / d media) of float media."""
        media = torch.from_numpy(np.array(media_BFCHW))
        value_B, gradient = self._rewards.gradient_of(self._reward, media, prompts)
        return value_B, gradient.numpy()


class RemoteRewards(LiveRewards):
    """The same rewards in the pools: a question whose worker dies or hangs is asked again, elsewhere or when it is back."""

    def __init__(self, sample: Sample, judges: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(sample.rewards, sample.held_out, scorers={})
        self._judges, self._runtime, self._turn = judges, sample.runtime, 0

    def scores(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], *, held_out: bool = False) -> Scores:
        import ray

        pixels = ray.put(as_uint8(media_BFCHW))
        raw = {}
        for reward in [*self._rewards, *(self._held_out if held_out else [])]:
            raw[reward.title], reason = self._ask(reward.title, "scores", pixels, tuple(prompts))
            self.reason = reason or self.reason
        return self.counted(raw)

    def gradient_of(
        self, reward: Reward, media_BFCHW: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[np.ndarray, torch.Tensor]:
        media = media_BFCHW.detach().float().cpu().numpy()
        value_B, gradient = self._ask(reward.title, "gradient", media, tuple(prompts))
        return value_B, torch.from_numpy(np.array(gradient)).to(media_BFCHW)

    def _ask(self, title: str, method: str, *arguments: Any) -> Any:
        import ray
        import ray.exceptions

        deadline = time.monotonic() + self._runtime.recovery_seconds
        hangs = 0
        while True:
            self._turn += 1
            judge = self._judges[title][self._turn % len(self._judges[title])]
            try:
                return ray.get(getattr(judge, method).remote(*arguments), timeout=self._runtime.unit_timeout_seconds)
            except ray.exceptions.RayActorError as error:
                if time.monotonic() > deadline:
                    raise RewardLost(f"no worker of reward {title} came back: {error}") from error
                time.sleep(0.2)
            except ray.exceptions.GetTimeoutError as error:
                hangs += 1
                ray.kill(judge, no_restart=False)
                if hangs >= self._runtime.max_attempts:
                    seconds = self._runtime.unit_timeout_seconds
                    raise RewardLost(f"reward {title} gave no answer in {seconds:g} s, {hangs} times") from error
                deadline = time.monotonic() + self._runtime.recovery_seconds
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise


class SampleWorker(Worker):
    """Holds a policy; does one piece of work a call."""

    def __init__(self, sample: Sample, judges: Mapping[str, Sequence[Any]], label: str) -> None:
        torch.set_num_threads(sample.runtime.rollout_threads)
        self.label = label
        self._policy = ready_policy(sample.model, usable(sample.runtime.device, "runtime.device"), sample.interpolation)
        self._rewards = RemoteRewards(sample, judges)

    def do(self, work: Work) -> Done:
        """The piece, done."""
        return perform(work, self._policy, self._rewards)

    def shape(self, plan: Plan) -> tuple[Any, tuple[int, ...]]:
        """(noise path, latent shape under a plan)."""
        return self._policy.path, self._policy.latent_shape(plan)


class RayEngine(Engine):
    """Pieces on a pool of actors, results in order."""

    def __init__(self, sample: Sample, actors: Sequence[Any]) -> None:
        from rlalign.work import Cost

        self.rows, self.cost, self.reason, self.restarts = sample.rows, Cost(), "", 0
        self._runtime: RuntimeSettings = sample.runtime
        self._loop = asyncio.new_event_loop()
        self._actors, self._pool = list(actors), None
        self.path, self._shape = self._ask_first(sample.plan)

    def _ask_first(self, plan: Plan) -> tuple[Any, tuple[int, ...]]:
        return self._loop.run_until_complete(self._all([("the policy", lambda a: a.shape.remote(plan))]))[0]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return self._shape

    def map(self, works: Sequence[Work]) -> list[Any]:
        calls = [(f"piece {i + 1} of {len(works)}", lambda a, w=w: a.do.remote(w)) for i, w in enumerate(works)]
        done: list[Done] = self._loop.run_until_complete(self._all(calls))
        self.cost = sum((d.cost for d in done), self.cost)
        self.reason = next((d.reason for d in reversed(done) if d.reason), self.reason)
        return [d.value for d in done]

    async def _all(self, calls: Sequence[tuple[str, Any]]) -> list[Any]:
        if self._pool is None:  # its queue belongs to the loop
            patience = self._runtime.recovery_seconds
            self._pool = Pool(ROLLOUT, self._actors, patience_seconds=patience, in_flight=2)
        pool = self._pool

        async def one(what: str, call: Any) -> Any:
            seconds = self._runtime.unit_timeout_seconds
            return await tried(what, pool, lambda actor: pool.answer(actor, call(actor), seconds), self._runtime)

        tasks = [asyncio.ensure_future(one(what, call)) for what, call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self.restarts = pool.restarts

    def close(self) -> None:
        """Waits for nobody any more: a worker that is still starting is not needed."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


def create_actors(sample: Sample) -> tuple[list[Any], dict[str, list[Any]]]:
    """(rollout actors, reward title -> its actors), owned by this process."""
    import ray

    runtime, mark = sample.runtime, uuid.uuid4().hex[:6]
    places = options(runtime.reward_cpus, runtime.reward_gpus, runtime.reward_resources, runtime.reward_labels)
    judge_class: Any = ray.remote(**places, **RESTART)(JudgeWorker)
    judges = {
        reward.title: [
            judge_class.options(name=f"{sample.name}-{mark}/reward-{reward.title}-{i}").remote(
                reward, runtime.reward_device, runtime.rollout_threads, f"reward {reward.title} {i}"
            )
            for i in range(runtime.reward_workers)
        ]
        for reward in sample.rewards_for("evaluate")
    }
    places = options(runtime.rollout_cpus, runtime.rollout_gpus, runtime.rollout_resources, runtime.rollout_labels)
    worker_class: Any = ray.remote(**places, **RESTART)(SampleWorker)
    workers = [
        worker_class.options(name=f"{sample.name}-{mark}/rollout-{i}").remote(sample, judges, f"rollout {i}")
        for i in range(runtime.rollout_workers)
    ]
    return workers, judges


def sample_on_ray(sample: Sample, folder: Path, on_record: OnRecord, *, address: str | None) -> dict[str, Any]:
    """On a local Ray, or the cluster at ``address``. Raises UserError on a user's mistake, RunFailed with a worker's error."""
    from rlalign.runtime.collect import RunFailed

    dashboard = cluster.connect(sample, address)
    import ray

    try:
        if dashboard:
            on_record({"note": f"Ray dashboard: {dashboard} (if it asks for a token: ray get-auth-token)"})
        workers, judges = create_actors(sample)
        engine = RayEngine(sample, workers)
        try:
            return run_sample(sample, folder, engine, on_record)
        finally:
            engine.close()
            for actor in [*workers, *(a for some in judges.values() for a in some)]:
                ray.kill(actor)
    except (PoolLost, UnitFailed) as error:
        raise RunFailed(str(error)) from error
    finally:
        ray.shutdown()
