"""Sampling on Ray: pieces of work on the rollout pool, rewards asked in the reward pools.

    driver: the method --pieces--> rollout pool --pictures--> reward pools
                ^------- values and costs -------'   (scores, or gradients of the pictures)

The driver decides and keeps the order; workers hold nothing of the run, so any of them may die: its
piece is given out again, and a question to a reward worker that died is asked again. Pieces are
fixed and noise is keyed, so the pictures are those of one process, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from rlalign.core.locations import locate
from rlalign.runtime import cluster
from rlalign.runtime.actors import create_reward_worker, name_owner
from rlalign.runtime.engine import RayEngine
from rlalign.runtime.groups import create_policy_worker
from rlalign.runtime.pool import ObjectGone, PoolLost, UnitFailed
from rlalign.runtime.reservation import sample_bundles
from rlalign.runtime.rewards import RewardActors
from rlalign.runtime.roles import ROLLOUT, reward_role
from rlalign.runtime.words import create_encoder, reader_of
from rlalign.runtime.workers import PolicySource
from rlalign.sampling import Sample, run_sample
from rlalign.sampling.compare import OnRecord


def create_actors(
    sample: Sample,
) -> tuple[list[ActorHandle], RewardActors, ActorHandle | None]:
    """(rollout actors, the reward actors that they ask, the one that encodes for them where there
    is one), owned by this process."""
    runtime = sample.runtime
    owner = name_owner(sample.name)

    # reward workers exist first, since rollout workers call them
    actors: dict[str, list[ActorHandle]] = {}
    for reward in sample.rewards_for("evaluate"):
        numbers = range(runtime.reward.workers)
        actors[reward.title] = [create_reward_worker(owner, i, reward, runtime) for i in numbers]
    asked = RewardActors(
        rewards=sample.rewards, held_out=sample.held_out, actors=actors, runtime=runtime
    )

    # found and located here: what names a run folder names that of the command
    recipe = locate(sample.model.recipe, "policy", here=False)
    encoder = create_encoder(owner, recipe, runtime)
    source = PolicySource(
        model=replace(sample.model, recipe=recipe),
        runtime=runtime,
        interpolation=sample.interpolation,
        reader=reader_of(encoder, runtime),
        shapes=((sample.plan, sample.rows),),
    )

    # each rollout worker prefers another reward worker
    workers = [
        create_policy_worker(owner, i, replace(source, rewards=asked.prefer(i)))
        for i in range(runtime.rollout.workers)
    ]
    return workers, asked, encoder


def sample_on_ray(
    sample: Sample, folder: Path, on_record: OnRecord, *, address: str | None
) -> dict[str, Any]:
    """On a local Ray, or the cluster at ``address``. Raises UserError on a user's mistake,
    RunFailed with a worker's error."""
    from rlalign.runtime.training.collect import RunFailed

    sample = locate(sample, here=address is None)
    sample.model.refuse_spread(sample.runtime.rollout.shard)
    dashboard = cluster.connect(
        sample_bundles(sample),
        sample.runtime.device,
        address,
        lambda note: on_record({"note": note}),
    )
    import ray

    try:
        if dashboard:
            on_record(
                {"note": f"Ray dashboard: {dashboard} (if it asks for a token: ray get-auth-token)"}
            )
        workers, asked, encoder = create_actors(sample)
        members = {ROLLOUT: workers, **{reward_role(t): a for t, a in asked.actors.items()}}
        engine = RayEngine(sample.runtime, members, sample.unit, rows=sample.rows)
        try:
            return run_sample(sample, folder, engine, on_record)
        finally:
            engine.close()
            for actor in chain(*members.values(), [encoder] if encoder is not None else []):
                ray.kill(actor)
    except (ObjectGone, PoolLost, UnitFailed) as error:
        raise RunFailed(str(error)) from error
    finally:
        ray.shutdown()
