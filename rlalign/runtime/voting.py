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
from rlalign.ballots.records import Stock
from rlalign.core.locations import locate
from rlalign.core.records import Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.runtime import cluster
from rlalign.runtime.actors import create_policy_worker, name_owner
from rlalign.runtime.engine import RayEngine
from rlalign.runtime.gauges import Gauges
from rlalign.runtime.pool import ObjectGone, PoolLost, UnitFailed
from rlalign.runtime.reservation import bundle_of
from rlalign.runtime.roles import ROLLOUT
from rlalign.runtime.workers import PolicySource
from rlalign.voting.drawn import DrawnSource, Side, models_of
from rlalign.voting.queue import LEARNED
from rlalign.voting.serve import Say, serve_vote
from rlalign.voting.settings import Vote


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
            vote,
            say,
            on_ready=on_ready,
            make_source=lambda vote: open_source_on_ray(vote, models),
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


def open_source_on_ray(vote: Vote, models: list[Model]) -> DrawnSource:
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
    return DrawnSource(
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
