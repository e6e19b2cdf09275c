"""The driver: creates and owns every actor, runs the learner under Ray Train, shows what is recorded.

The driver owns the pools, so rollout and reward workers outlive a restart of the learner. A killed learner is started again
by Ray Train and goes on from the run folder's newest checkpoint, as ``--resume`` would.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import control
from rlalign.config import Run
from rlalign.evaluate import read_final
from rlalign.registry import UserError

if TYPE_CHECKING:
    from rlalign.runtime.coordinator import Failure

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
        _supervise(run, folder.resolve(), on_record, dashboard=dashboard, places_are_cores=address is not None)
    finally:
        ray.shutdown()


def _supervise(run: Run, folder: Path, on_record: OnRecord, *, dashboard: str, places_are_cores: bool) -> None:
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rlalign.runtime.collect import RunFailed
    from rlalign.runtime.fleet import Fleet
    from rlalign.runtime.supervisor import Supervisor

    control.forget(folder)
    fleet = Fleet(run, places_are_cores=places_are_cores)
    status = control.Status(folder, run.rounds, name=run.name, dashboard=dashboard, job=job_id())
    supervisor = Supervisor(run, folder, fleet, status, on_record)
    supervisor.start()
    crash, told = "", None
    try:
        told = fit(run, folder, fleet.coordinator)
    except TrainingFailedError as error:  # the coordinator may know the reason better
        crash = str(error)
    except BaseException:
        supervisor.leave()  # before Ray is left: what it asked then would start another one
        status.write(state="stopped")
        raise
    failure = supervisor.stop() or told
    fleet.end()
    ended = read_final(folder, run.rounds) is not None
    failed = failure or crash or (supervisor.error and not ended)
    status.write(state="failed" if failed else "ended" if ended else "stopped")
    if supervisor.error is not None:
        raise supervisor.error
    if failure is not None:
        raise UserError(failure.message) if failure.is_users else RunFailed(failure.message)
    if crash:
        raise RunFailed(f"the learner died more than {run.runtime.max_attempts} times; the last time it said:\n{crash}")


def job_id() -> str:
    """The submission id of the Ray job that this process is the driver of; "" where it is none."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return (config.get("metadata") or {}).get("job_submission_id", "")


def fit(run: Run, folder: Path, coordinator: Any) -> Failure | None:
    """Runs the learner under Ray Train V2 until it returns; a killed one is started again ``max_attempts`` times.

    Answers with what the learner ended for, where it could not go on: a coordinator that died since has forgotten it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    runtime = run.runtime
    scratch = folder / ".train"
    resources = {"CPU": runtime.learner_cpus} | ({"GPU": runtime.learner_gpus} if runtime.learner_gpus else {})
    trainer = TorchTrainer(
        learn,
        train_loop_config={"run": run, "folder": str(folder), "coordinator": coordinator},
        scaling_config=ScalingConfig(
            num_workers=runtime.learner_workers,
            use_gpu=bool(runtime.learner_gpus),
            resources_per_worker=resources | runtime.learner_resources,
            label_selector=runtime.learner_labels or None,
        ),
        run_config=RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:6]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=runtime.max_attempts),
        ),
    )
    try:
        return trainer.fit().return_value
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def learn(config: dict[str, Any]) -> Failure | None:
    """One learner process: rlalign.loop's own loop over the cluster's Collect. Answers with why it cannot go on, if so."""
    import torch
    from accelerate.utils import broadcast_object_list

    from rlalign.assemble import build_learner
    from rlalign.loop import align
    from rlalign.runtime.collect import CoordinatorLost, RemoteCollect, patient
    from rlalign.runtime.coordinator import failure_of

    run, coordinator = config["run"], config["coordinator"]
    torch.set_num_threads(run.runtime.learner_threads)
    learner = None
    try:
        learner = build_learner(run)
        incarnation, over = uuid.uuid4().hex, None
        if learner.is_main:
            over = patient(lambda: coordinator.begin.remote(incarnation), 60)
        if learner.accelerator.num_processes > 1:  # the others go on once it has begun, or end with it
            said = [incarnation, over]
            broadcast_object_list(said)
            incarnation, over = said
        if over is not None:
            return over
        collect = RemoteCollect(
            run,
            coordinator,
            incarnation=incarnation,
            is_main=learner.is_main,
            learners=learner.accelerator.num_processes,
        )

        reader = _pair_reader(run)
        try:
            align(run, Path(config["folder"]), collect, learner, collect.record, pairs=reader)
        finally:
            if reader is not None:
                reader.close()
    except CoordinatorLost:  # Ray Train starts the group again, from the newest checkpoint
        raise
    except Exception as error:  # told to the driver in full; Ray Train would only try the same again
        if lost_a_peer(error):
            raise  # it tells so of the one that died; the group starts again, from the newest checkpoint
        failure = failure_of(error)
        patient(lambda: coordinator.abort.remote(failure), 60)
        if learner is not None and learner.accelerator.num_processes > 1:
            raise  # the other learners wait in a collective: the whole group has to end
        return failure
    return None


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception is a collective's own, as every learner of a group gets it when another one's process ends."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return isinstance(error, RuntimeError) and where.startswith("torch.distributed")


def _pair_reader(run: Run) -> Any:
    """Ray Data's reader of the run's preferences, where that is asked for."""
    if run.preferences is None or run.preferences.reader != "ray":
        return None
    from rlalign.runtime.preferences import RayPairReader

    return RayPairReader(run.preferences, run.seed)
