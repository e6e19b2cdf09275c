"""The driver: creates and owns every actor, runs the learner under Ray Train, shows what is recorded.

The driver owns the pools, so rollout and reward workers outlive a restart of the learner. A killed learner is started again
by Ray Train and goes on from the run folder's newest checkpoint, as ``--resume`` would.
"""

from __future__ import annotations

import shutil
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlalign.config import Run
from rlalign.registry import UserError

OnRecord = Callable[[dict[str, Any]], None]


def train(run: Run, folder: Path, *, resume: bool, on_record: OnRecord, address: str | None) -> None:
    """Runs a run on Ray until its end. Raises UserError on a user's mistake, RunFailed with the worker's error otherwise."""
    from rlalign.runtime import cluster

    assert resume or not (folder / "checkpoints").exists()
    dashboard = cluster.connect(run, address)
    import ray

    try:
        if dashboard:
            on_record({"note": f"Ray dashboard: {dashboard} (if it asks for a token: ray get-auth-token)"})
        _supervise(run, folder.resolve(), on_record)
    finally:
        ray.shutdown()


def _supervise(run: Run, folder: Path, on_record: OnRecord) -> None:
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rlalign.runtime.collect import RunFailed

    coordinator, actors = create_actors(run)
    screen = _Screen(coordinator, on_record)
    screen.start()
    crash = ""
    try:
        fit(run, folder, coordinator)
    except TrainingFailedError as error:  # the coordinator may know the reason better
        crash = str(error)
    failure: Any = ray.get(coordinator.failure.remote(), timeout=60)
    screen.stop()
    for actor in [*actors, coordinator]:
        ray.kill(actor)
    if failure is not None:
        raise UserError(failure.message) if failure.is_users else RunFailed(failure.message)
    if crash:
        raise RunFailed(f"the learner died more than {run.runtime.max_attempts} times; the last time it said:\n{crash}")


def create_actors(run: Run) -> tuple[Any, list[Any]]:
    """(coordinator, all pool actors), owned by this process. Names tell role and number on the dashboard."""
    import ray

    from rlalign.runtime.coordinator import Coordinator
    from rlalign.runtime.workers import RewardWorker, RolloutWorker

    runtime, mark = run.runtime, uuid.uuid4().hex[:6]
    restart: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0}

    def named(role: str, number: int) -> str:
        return f"{run.name}-{mark}/{role}-{number}"

    rollout_class: Any = ray.remote(num_cpus=runtime.rollout_cpus, num_gpus=runtime.rollout_gpus, **restart)(
        RolloutWorker
    )
    rollouts = [
        rollout_class.options(name=named("rollout", i)).remote(run, f"rollout {i}")
        for i in range(runtime.rollout_workers)
    ]
    reward_class: Any = ray.remote(num_cpus=runtime.reward_cpus, num_gpus=runtime.reward_gpus, **restart)(RewardWorker)
    rewards = {
        reward.title: [
            reward_class.options(name=named(f"reward-{reward.title}", i)).remote(
                reward, runtime.device, runtime.rollout_threads, f"reward {reward.title} {i}"
            )
            for i in range(runtime.reward_workers)
        ]
        for reward in run.rewards_for("evaluate")
    }
    alone: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
    coordinator_class: Any = ray.remote(**alone)(Coordinator)
    coordinator: Any = coordinator_class.options(name=named("coordinator", 0)).remote(run, rollouts, rewards)
    return coordinator, [*rollouts, *(a for group in rewards.values() for a in group)]


def fit(run: Run, folder: Path, coordinator: Any) -> None:
    """Runs the learner under Ray Train V2 until it returns; a killed one is started again ``max_attempts`` times."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    runtime = run.runtime
    scratch = folder / ".train"
    resources = {"CPU": runtime.learner_cpus} | ({"GPU": runtime.learner_gpus} if runtime.learner_gpus else {})
    trainer = TorchTrainer(
        learn,
        train_loop_config={"run": run, "folder": str(folder), "coordinator": coordinator},
        scaling_config=ScalingConfig(
            num_workers=runtime.learner_workers, use_gpu=bool(runtime.learner_gpus), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:6]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=runtime.max_attempts),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def learn(config: dict[str, Any]) -> None:
    """One learner process: rlalign.loop's own loop over the cluster's Collect."""
    import ray
    import torch
    from accelerate.utils import broadcast_object_list

    from rlalign.assemble import build_learner
    from rlalign.loop import align
    from rlalign.runtime.collect import RemoteCollect
    from rlalign.runtime.coordinator import failure_of

    run, coordinator = config["run"], config["coordinator"]
    torch.set_num_threads(run.runtime.learner_threads)
    learner = None
    try:
        learner = build_learner(run)
        names = [uuid.uuid4().hex]
        if learner.accelerator.num_processes > 1:
            broadcast_object_list(names)
        if learner.is_main and ray.get(coordinator.begin.remote(names[0]), timeout=60) is not None:
            return  # the run is over; the driver knows why
        learner.accelerator.wait_for_everyone()
        collect = RemoteCollect(
            run,
            coordinator,
            incarnation=names[0],
            is_main=learner.is_main,
            learners=learner.accelerator.num_processes,
        )

        def on_record(line: dict[str, Any]) -> None:
            ray.get(coordinator.record.remote(line), timeout=60)

        reader = _pair_reader(run)
        try:
            align(run, Path(config["folder"]), collect, learner, on_record, pairs=reader)
        finally:
            if reader is not None:
                reader.close()
    except Exception as error:  # told to the driver in full; Ray Train would only try the same again
        ray.get(coordinator.abort.remote(failure_of(error)), timeout=60)
        if learner is not None and learner.accelerator.num_processes > 1:
            raise  # the other learners wait in a collective: the whole group has to end


def _pair_reader(run: Run) -> Any:
    """Ray Data's reader of the run's preferences, where that is asked for."""
    if run.preferences is None or run.preferences.reader != "ray":
        return None
    from rlalign.runtime.preferences import RayPairReader

    return RayPairReader(run.preferences, run.seed)


class _Screen(threading.Thread):
    """Hands the coordinator's records to the caller while the driver waits for the learner."""

    def __init__(self, coordinator: Any, on_record: OnRecord) -> None:
        super().__init__(name="screen", daemon=True)
        self._coordinator, self._on_record, self._over = coordinator, on_record, threading.Event()
        self._seen = 0

    def run(self) -> None:
        while not self._over.is_set():
            self._show(timeout_seconds=0.5)

    def _show(self, timeout_seconds: float) -> None:
        import ray
        import ray.exceptions

        try:
            lines = ray.get(self._coordinator.records.remote(self._seen, timeout_seconds), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            print(f"progress is not shown for now: {error}", file=sys.stderr)
            return
        for line in lines:
            self._on_record(line)
        self._seen += len(lines)

    def stop(self) -> None:
        """Shows what is left and ends."""
        self._over.set()
        self.join(timeout=30)
        self._show(timeout_seconds=0.0)
