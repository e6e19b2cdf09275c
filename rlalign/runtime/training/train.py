"""The driver: creates and owns every actor, runs the learner under Ray Train, shows what is
recorded.

The driver owns the pools, so rollout and reward workers outlive a restart of the learner. A killed
learner is started again by Ray Train and goes on from the run folder's newest checkpoint, as
``--resume`` would.
"""

from __future__ import annotations

import gc
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import storage
from rlalign.alignment import control
from rlalign.config import Run, locate_run
from rlalign.core.garbage import pause_collection
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import first_pair
from rlalign.learning import folders
from rlalign.learning.evaluate import read_final
from rlalign.learning.log import check_sinks
from rlalign.runtime.jobs.publish import job_id, publish_status

if TYPE_CHECKING:
    from rlalign.learning.learner import Learner
    from rlalign.runtime.training.coordinator import Failure
    from rlalign.runtime.training.fleet import Fleet

OnRecord = Callable[[dict[str, Any]], None]
LEAVES = "the learner leaves its node"
"""What a learner returns that has written a checkpoint and goes on elsewhere."""


def train(
    run: Run, folder: Path | str, *, resume: bool, on_record: OnRecord, address: str | None
) -> None:
    """Runs a run on Ray until its end; ``folder`` may be a URL. Raises UserError on a user's
    mistake, RunFailed with the worker's error otherwise."""
    from rlalign.runtime import cluster
    from rlalign.runtime.reservation import run_bundles

    run = locate_run(run, begun=resume, here=address is None)

    # on a cluster, the learner's node may be the one that has them
    if run.preferences is not None and address is None:
        first_pair(run.preferences, run.plan.frames)
    if address is None:
        check_sinks(run.log)
    place = storage.find_place(folder)
    place = place.resolve() if isinstance(place, Path) else place
    if not isinstance(place, Path) and run.learner.shard == "all":
        _refuse_shards(run)

    def tell(note: str) -> None:
        on_record({"note": note})

    dashboard = cluster.connect(run_bundles(run), run.runtime.device, address, tell)
    import ray

    try:
        if dashboard:
            tell(f"Ray dashboard: {dashboard} (if it asks for a token: ray get-auth-token)")
        with (
            storage.own_run(place, learns=False, tell=tell) as here,
            folders.owned(here, resume=resume),
        ):
            _supervise(
                run, here, on_record, dashboard=dashboard, places_are_cores=address is not None
            )
    finally:
        ray.shutdown()


def _refuse_shards(run: Run) -> None:
    """Raises UserError where learners would write a checkpoint together on an object store."""
    if run.runtime.learner.workers > 1:
        raise UserError(
            "learner.shard must be none or base where the run folder is on an object store, got"
            " all: its learners write each checkpoint together; name a folder that they share"
        )


def _supervise(
    run: Run, folder: Path, on_record: OnRecord, *, dashboard: str, places_are_cores: bool
) -> None:
    from ray.train.v2.api.exceptions import TrainingFailedError

    from rlalign.runtime.training.collect import RunFailed
    from rlalign.runtime.training.fleet import Fleet
    from rlalign.runtime.training.nodes import Nodes
    from rlalign.runtime.training.supervisor import Supervisor

    control.forget(folder)
    job = job_id()
    if job:
        publish_status(folder, job)
    status = control.Status(folder, run.rounds, name=run.name, dashboard=dashboard, job=job)
    fleet = Fleet(run, places_are_cores=places_are_cores, nodes=Nodes.after(status.nodes))
    supervisor = Supervisor(run, folder, fleet, status, on_record)
    supervisor.start()
    crash, told = "", None
    try:
        told = _fit_until_over(run, folder, fleet)
    except TrainingFailedError as error:  # the coordinator may know the reason better
        crash = str(error)
    except BaseException:
        supervisor.leave()  # before Ray is left: what it asked then would start another one
        status.write(state="stopped")
        raise

    # the supervisor may have heard a better reason than Ray Train has
    failure = supervisor.stop() or told
    fleet.end()
    if not (failure or crash or supervisor.error):
        storage.refresh(folder)  # what the learner has written
    ended = read_final(folder, run.rounds) is not None
    failed = failure or crash or (supervisor.error and not ended)
    status.write(state="failed" if failed else "ended" if ended else "stopped")
    if supervisor.error is not None:
        raise supervisor.error
    if failure is not None:
        raise UserError(failure.message) if failure.is_users else RunFailed(failure.message)
    if crash:
        raise RunFailed(
            f"the learner died more than {run.runtime.max_attempts} times; the last time it"
            f" said:\n{crash}"
        )


def _fit_until_over(run: Run, folder: Path, fleet: Fleet) -> Failure | None:
    """``fit``, again for a learner that has left its node; with what it ended for."""
    told: Failure | str | None = LEAVES
    while isinstance(told, str):
        told = fit(
            run, folder, fleet.coordinator, fleet.encoder, nodes_may_go=fleet.places_are_cores
        )
    return told


def fit(
    run: Run, folder: Path, coordinator: Any, encoder: Any = None, *, nodes_may_go: bool = False
) -> Failure | str | None:
    """Runs the learner under Ray Train V2 until it returns; a killed one is started again
    ``max_attempts`` times, and, where ``nodes_may_go``, as often as its node is taken away with
    notice.

    Answers with what the learner ended for, where it could not go on: a coordinator that died since
    has forgotten it. LEAVES says that it goes on on another node.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from rlalign.runtime.reservation import bundle_of
    from rlalign.runtime.roles import LEARNER
    from rlalign.runtime.training.watch import WatchHere

    # Ray Train keeps its own files in a folder that goes with the run
    learner = run.runtime.learner
    scratch = folder / ".train"
    callbacks: Any = [WatchHere()] if nodes_may_go else None
    trainer = TorchTrainer(
        learn,
        train_loop_config={
            "run": run,
            "place": storage.place_of(folder),
            "owner": storage.owner_of(folder),
            "coordinator": coordinator,
            "encoder": encoder,
        },
        scaling_config=ScalingConfig(
            num_workers=learner.workers,
            use_gpu=bool(learner.gpus),
            resources_per_worker=dict(bundle_of(LEARNER, learner).needs),
            label_selector=learner.labels or None,
        ),
        run_config=RunConfig(
            name=f"{run.name}-{uuid.uuid4().hex[:6]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=run.runtime.max_attempts),
            callbacks=callbacks,
        ),
    )

    # its own checkpoints are of no use afterwards
    try:
        return trainer.fit().return_value
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def learn(config: dict[str, Any]) -> Failure | str | None:
    """One learner process: the loop of rlalign.alignment over the cluster's Collect. Returns why it
    cannot go on, if so, or LEAVES."""
    import torch

    from rlalign.alignment.assemble import build_learner
    from rlalign.networks.sharding import NotLoaded, lost_a_peer
    from rlalign.runtime.training.collect import CoordinatorLost, ask_until_answered
    from rlalign.runtime.training.coordinator import failure_of
    from rlalign.runtime.words import reader_of
    from rlalign.runtime.workers import naming_the_node

    run = config["run"]
    coordinator = config["coordinator"]
    torch.set_num_threads(run.runtime.learner.threads)
    learner = None
    try:
        with naming_the_node(), pause_collection():
            learner = build_learner(run, reader_of(config.get("encoder"), run.runtime))
        gc.freeze()  # what is loaded by now stays
        return _align(config, learner)
    except CoordinatorLost:  # Ray Train starts the group again, from the newest checkpoint
        raise
    except Exception as error:
        if lost_a_peer(error):
            # it tells so of the one that died; the group starts again, from the newest checkpoint
            raise
        # told to the driver in full; Ray Train would only try the same again
        failure = failure_of(error)
        ask_until_answered(lambda: coordinator.abort.remote(failure), 60)
        # the other learners wait in a collective: the whole group has to end
        alone = learner is None and (run.learner.shard == "none" or isinstance(error, NotLoaded))
        if not alone and run.runtime.learner.workers > 1:
            raise
        return failure


def _align(config: dict[str, Any], learner: Learner) -> Failure | str | None:
    """The run, by a learner that has been built. Returns why the run is over where it had ended
    before, or LEAVES."""
    import ray
    from accelerate.utils import gather_object

    from rlalign.alignment.loop import align
    from rlalign.networks.precision import rounded_names
    from rlalign.runtime.training.collect import RemoteCollect
    from rlalign.runtime.workers import naming_the_node

    run, coordinator = config["run"], config["coordinator"]

    incarnation, over = _begin(coordinator, learner)
    if over is not None:
        return over

    # each learner says where it is
    policy = learner.policy
    home = ray.get_runtime_context().get_node_id()
    homes = gather_object([home]) if learner.accelerator.num_processes > 1 else [home]
    collect = RemoteCollect(
        run,
        coordinator,
        incarnation=incarnation,
        is_main=learner.is_main,
        homes=homes,
        rounded=rounded_names(policy.network, policy.precision),
    )

    # pairs that Ray Data reads end with the learner
    reader = _pair_reader(run)
    try:
        with (
            naming_the_node(),
            storage.join_run(
                config["place"],
                config["owner"],
                learns=learner.is_main,
                tell=lambda note: collect.record({"note": note}),
            ) as folder,
        ):
            leaves = align(run, folder, collect, learner, collect.record, pairs=reader)
    finally:
        if reader is not None:
            reader.close()
    return LEAVES if leaves else None


def _begin(coordinator: Any, learner: Learner) -> tuple[str, Failure | None]:
    """The main learner tells the coordinator that it begins: under which name, and why the run is
    over where it had ended before. The others hear it."""
    from accelerate.utils import broadcast_object_list

    from rlalign.runtime.training.collect import ask_until_answered

    said = [uuid.uuid4().hex, None]
    if learner.is_main:
        said[1] = ask_until_answered(lambda: coordinator.begin.remote(said[0]), 60)
    if learner.accelerator.num_processes > 1:
        broadcast_object_list(said)
    return said[0], said[1]


def _pair_reader(run: Run) -> Any:
    """Ray Data's reader of the run's preferences, where that is asked for."""
    if run.preferences is None or run.preferences.reader != "ray":
        return None
    from rlalign.runtime.pairs import RayPairReader

    return RayPairReader(run.preferences, run.seed, frames=run.plan.frames)
