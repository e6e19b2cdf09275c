"""Pictures for people on Ray: one rollout pool a policy, asked by the queue of ``rlalign vote``.

    queue (this process) --pieces--> rollout pool of each side --pictures--> store (this process)

The page and the store stay with the command: votes have one owner and a disk. Drawing is what
scales. Pieces are fixed and noise is keyed, so the pictures are those of one process, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from ray.actor import ActorHandle

from rlalign.alignment.models import Model
from rlalign.ballots.records import Stock
from rlalign.config import Run
from rlalign.core.locations import locate
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.data.prompts.base import Prompts
from rlalign.runtime import cluster
from rlalign.runtime.actors import name_owner
from rlalign.runtime.engine import RayEngine
from rlalign.runtime.gauges import Gauges
from rlalign.runtime.groups import create_policy_worker, free_places
from rlalign.runtime.pool import ObjectGone, PoolLost, UnitFailed
from rlalign.runtime.reservation import rollout_bundles
from rlalign.runtime.roles import ROLLOUT
from rlalign.runtime.workers import PolicySource
from rlalign.voting.pictures import PictureSource
from rlalign.voting.queue import LEARNED
from rlalign.voting.serve import Say, open_source, serve_vote
from rlalign.voting.settings import Vote
from rlalign.voting.sources.policy import EngineSource, Side, models_of
from rlalign.voting.sources.run import Drawing, RunSource


def serve_vote_on_ray(
    vote: Vote, say: Say, *, on_ready: Callable[[str], None], address: str | None
) -> None:
    """``rlalign.voting.serve_vote`` with pictures from the cluster at ``address``.

    Raises UserError on a user's mistake, RunFailed with a worker's error.
    """
    from rlalign.runtime.training.collect import RunFailed

    if vote.source.kind not in ("policy", "run"):
        raise UserError(
            "--address is for source.policy and source.run, whose pictures a cluster draws, got"
            f" source.{vote.source.kind}; leave it out"
        )
    vote = locate(vote, here=address is None)
    models = models_of(vote)
    for model in models:
        model.refuse_spread(vote.runtime.rollout.shard)
    bundles = rollout_bundles(vote.runtime) * max(len(models), 1)
    cluster.connect(bundles, vote.runtime.device, address, say)
    import ray

    try:
        serve_vote(
            vote,
            say,
            on_ready=on_ready,
            make_source=open_any_on_ray,
            meter=RayMeter(vote.name),
        )
    except (ObjectGone, PoolLost, UnitFailed) as error:
        raise RunFailed(str(error)) from error
    finally:
        ray.shutdown()


class RayMeter:
    """Tells Ray's metrics how a campaign stands: a ``Meter``."""

    def __init__(self, campaign: str) -> None:
        self._gauges = Gauges(campaign)
        self._votes: int | None = None

    def note_stock(self, stock: Stock) -> None:
        """See ``Meter``. Votes of before are not counted, and one that is undone stays counted."""
        before = stock.votes if self._votes is None else self._votes
        self._gauges.count("rlalign_votes_total", max(stock.votes - before, 0))
        self._votes = max(stock.votes, before)
        ready = sum(stock.items.get(kind, 0) for kind in LEARNED)
        self._gauges.set("rlalign_pairs_ready", ready)
        self._gauges.set("rlalign_ballots_open", stock.open)
        self._gauges.flush()

    def note_drawing(self, seconds: float) -> None:
        """See ``Meter``."""
        self._gauges.observe("rlalign_drawing_seconds", seconds)


def open_any_on_ray(vote: Vote) -> PictureSource:
    """The source of a campaign, drawn by Ray, which must be running."""
    if vote.source.kind == "run":
        return open_run_on_ray(vote)
    return open_source_on_ray(vote, models_of(vote))


def open_run_on_ray(vote: Vote) -> RunSource:
    """The newest checkpoint of a run on a pool of rollout workers, which is made once the run has
    begun. Its weights are read here, and travel to each worker once."""
    source = open_source(vote)
    assert isinstance(source, RunSource), "the vote file says so"
    pool = contextlib.ExitStack()

    def draw_there(run: Run, rows: int) -> Drawing:
        count = vote.runtime.rollout.shard
        run.policy.refuse_spread("runtime.rollout.shard", count, trained=True)
        model = Model(title=source.folder.name, recipe=run.policy)
        workers = pool.enter_context(_workers(vote, model))
        unit = _example(run.prompts, vote.seed, run.plan)
        engine = RayEngine(vote.runtime, {ROLLOUT: workers}, unit, rows=rows)
        pool.callback(engine.close)
        return Drawing(engine=engine, set_weights=engine.set_weights)

    source.make_drawing = draw_there
    source.release = pool.close
    return source


def open_source_on_ray(vote: Vote, models: list[Model]) -> EngineSource:
    """A pool of rollout workers for each policy, owned by this process. Ray must be running."""
    assert vote.prompts is not None, "checked by the settings"
    sides: list[Side] = []
    unit = _example(vote.prompts, vote.seed, vote.source.plan)
    with contextlib.ExitStack() as pool:
        for model in models:
            workers = pool.enter_context(_workers(vote, model))
            engine = RayEngine(vote.runtime, {ROLLOUT: workers}, unit, rows=vote.source.rows)
            pool.callback(engine.close)
            sides.append(Side(title=model.title, engine=engine))
        return EngineSource.of(vote, sides, pool.pop_all().close)


def _example(prompts: Prompts, seed: int, plan: Plan) -> Unit:
    """A unit by which an engine asks what the policy is to a plan."""
    return Unit.of_rows(UnitKey("vote", 0, 0), [(0, prompts.pool()[0], 0)], seed, plan)


@contextlib.contextmanager
def _workers(vote: Vote, model: Model) -> Iterator[list[ActorHandle]]:
    """Rollout workers of a policy, killed at the end."""
    import ray

    # what names a run folder names that of the command
    located = replace(model, recipe=locate(model.recipe, "source.policy", here=False))
    source = PolicySource(model=located, runtime=vote.runtime)
    owner = name_owner(vote.name)
    actors: list[ActorHandle] = []
    try:
        for number in range(vote.runtime.rollout.workers):
            actors.append(create_policy_worker(owner, number, source))
        yield actors
    finally:
        for number, actor in enumerate(actors):
            ray.kill(actor)
            free_places(owner, ROLLOUT, number)
