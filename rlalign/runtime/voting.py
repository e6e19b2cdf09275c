"""Pictures for people on Ray: one rollout pool a policy, asked by the queue of ``rlalign vote``.

    queue (this process) --pieces--> rollout pool of each side --pictures--> store (this process)

The page and the store stay with the command: votes have one owner and a disk. Drawing is what
scales. Pieces are fixed and noise is keyed, so the pictures are those of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ray.actor import ActorHandle

from rlalign.alignment.models import Model
from rlalign.core.locations import locate
from rlalign.core.records import Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.runtime import cluster
from rlalign.runtime.actors import create_policy_worker, name_owner
from rlalign.runtime.engine import RayEngine
from rlalign.runtime.pool import ObjectGone, PoolLost, UnitFailed
from rlalign.runtime.reservation import bundle_of
from rlalign.runtime.roles import ROLLOUT
from rlalign.runtime.workers import PolicySource
from rlalign.voting.serve import Say, serve_vote
from rlalign.voting.settings import Vote
from rlalign.voting.sources.policy import EngineSource, Side, models_of


def serve_vote_on_ray(
    vote: Vote, say: Say, *, on_ready: Callable[[str], None], address: str | None
) -> None:
    """``rlalign.voting.serve_vote`` with pictures from the cluster at ``address``.

    Raises UserError on a user's mistake, RunFailed with a worker's error.
    """
    from rlalign.runtime.training.collect import RunFailed

    if vote.source.kind != "policy":
        raise UserError(
            "--address is for source.policy, whose pictures a cluster draws, got"
            f" source.{vote.source.kind}; leave it out"
        )
    vote = locate(vote, here=address is None)
    models = models_of(vote)
    workers = vote.runtime.rollout.workers * len(models)
    bundles = [bundle_of(ROLLOUT, vote.runtime.rollout)] * workers
    cluster.connect(bundles, vote.runtime.device, address, say)
    import ray

    try:
        serve_vote(
            vote, say, on_ready=on_ready, make_source=lambda vote: open_source_on_ray(vote, models)
        )
    except (ObjectGone, PoolLost, UnitFailed) as error:
        raise RunFailed(str(error)) from error
    finally:
        ray.shutdown()


def open_source_on_ray(vote: Vote, models: list[Model]) -> EngineSource:
    """A pool of rollout workers for each policy, owned by this process. Ray must be running."""
    import ray

    assert vote.prompts is not None, "checked by the settings"
    sides: list[Side] = []
    actors: list[ActorHandle] = []
    engines: list[RayEngine] = []
    caption = vote.prompts.pool()[0]
    unit = Unit.of_rows(UnitKey("vote", 0, 0), [(0, caption, 0)], vote.seed, vote.source.plan)

    def release() -> None:
        for engine in engines:
            engine.close()
        for actor in actors:
            ray.kill(actor)

    try:
        for model in models:
            workers = _create_workers(vote, model)
            actors += workers
            engine = RayEngine(vote.runtime, {ROLLOUT: workers}, unit, rows=vote.source.rows)
            engines.append(engine)
            sides.append(Side(title=model.title, engine=engine))
    except BaseException:
        release()
        raise
    return EngineSource(
        sides=sides,
        prompts_of=vote.prompts,
        plan=vote.source.plan,
        seed=vote.seed,
        count=vote.per_caption,
        release=release,
    )


def _create_workers(vote: Vote, model: Model) -> list[ActorHandle]:
    # what names a run folder names that of the command
    located = replace(model, recipe=locate(model.recipe, "source.policy", here=False))
    source = PolicySource(model=located, runtime=vote.runtime)
    owner = name_owner(vote.name)
    return [
        create_policy_worker(owner, number, source)
        for number in range(vote.runtime.rollout.workers)
    ]
