"""A campaign as a whole: its store, its source of pictures, the queue between them, the page, and
simulated people where they are asked for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import PAIR_CHOICES, RANK_CHOICES, Campaign, digest
from rlalign.ballots.store import Store
from rlalign.core.locations import locate
from rlalign.core.registry import UserError
from rlalign.voting.choice import make_rules
from rlalign.voting.filter import PictureFilter
from rlalign.voting.pairing import Pairing
from rlalign.voting.pictures import PictureSource
from rlalign.voting.queue import Meter, Queue, keep_all
from rlalign.voting.settings import Vote
from rlalign.web.vote.ballots_desk import BallotsDesk
from rlalign.web.vote.desk import About
from rlalign.web.vote.people import Secret, join_url, read_secret

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A campaign that is open: what the page and simulated people are given."""

    vote: Vote
    store: Store
    queue: Queue
    desk: BallotsDesk


@contextlib.contextmanager
def opened(
    vote: Vote, source: PictureSource, say: Say, meter: Meter | None = None
) -> Iterator[Served]:
    """A campaign with its queue at work, until the end of the body; then its votes are exported
    where that is asked for."""
    store = Store.open(vote.place)
    try:
        campaign = Campaign(id=vote.name, mode=vote.mode, created=time.time())
        store.create_campaign(campaign)
        rules = make_rules(vote, store)
        desk = BallotsDesk(
            store=store,
            campaign=vote.name,
            about=about(vote),
            dealer=Deal(
                gold=vote.shares.gold,
                repeat=vote.shares.repeat,
                shared=vote.shares.shared,
                rule=rules.deal,
            ),
            votes_each=vote.votes_each,
        )
        queue = Queue(
            store=store,
            vote=vote,
            source=source,
            pairing=Pairing(vote=vote, pick=rules.pick),
            keep=PictureFilter(vote.filter) if vote.filter is not None else keep_all,
            watch=rules.watch,
            refresh=rules.refresh,
            ring=desk.notice.ring,
            meter=meter,
            say=say,
        )
        desk.source = queue
        queue.start()
        try:
            yield Served(vote=vote, store=store, queue=queue, desk=desk)
        finally:
            queue.close()
        if vote.export:
            export_votes(store, vote, say)
    finally:
        store.close()


def about(vote: Vote) -> About:
    """What the page says of itself."""
    words = vote.page
    allowed = RANK_CHOICES if vote.mode == "rank" else PAIR_CHOICES
    without = {"tie": words.ties, "both_bad": words.both_bad}
    return About(
        title=words.title or vote.name,
        mode=vote.mode,
        allowed=tuple(choice for choice in allowed if without.get(choice, True)),
        reasons=words.reasons,
        points=words.points,
        typing=words.typing,
        consent=words.consent,
        consent_version=digest("consent", words.consent)[:8] if words.consent else "",
        names_after=vote.mode == "ab",
    )


def export_votes(store: Store, vote: Vote, say: Say) -> None:
    """Writes the votes as preference pairs, where there are any."""
    from rlalign.data.pairs.votes import export_votes as write

    with contextlib.suppress(UserError):
        count = write(store, vote.name, Path(vote.export))
        say(f"{count} pairs in {vote.export}")


# --- sources -------------------------------------------------------------------------------------


def open_source(vote: Vote) -> PictureSource:
    """The source of a campaign in this process. Raises UserError on a user's mistake."""
    source = vote.source
    if source.kind in ("samples", "pictures"):
        return _files(vote)
    if source.kind == "run":
        from rlalign.voting.sources.run import RunSource

        return RunSource(
            folder=Path(source.run),
            seed=vote.seed,
            count=vote.per_caption,
            rows=source.rows,
            per_round=vote.votes_per_round,
            prompts_of=vote.prompts,
        )
    return _drawn(vote)


def _files(vote: Vote) -> PictureSource:
    from rlalign.voting.sources.files import FileSource, find_pictures, find_samples

    source = vote.source
    found = []
    for place in filter(None, (source.samples or source.pictures, source.against)):
        if not isinstance(place, str):
            raise UserError("source.against must be a path, as the other side is, got a policy")
        found.append(find_samples(Path(place)) if source.samples else find_pictures(place))
    return FileSource(found, seed=vote.seed, count=vote.per_caption)


def _drawn(vote: Vote) -> PictureSource:
    from rlalign.alignment.models import ready_policy
    from rlalign.engine.local import LiveRewards, LocalEngine
    from rlalign.networks.devices import usable
    from rlalign.voting.sources.policy import EngineSource, Side, models_of

    runtime = vote.runtime
    device = usable(runtime.device, "runtime.device")
    sides = []
    for model in models_of(vote):
        engine = LocalEngine.with_lanes(
            ready_policy(model, device, 1.0),
            lambda: LiveRewards(()),
            workers=runtime.rollout.workers,
            rows=vote.source.rows,
            threads=runtime.rollout.threads,
        )
        sides.append(Side(title=model.title, engine=engine))
    return EngineSource.of(vote, sides)


# --- the command ---------------------------------------------------------------------------------


def serve_vote(
    vote: Vote,
    say: Say,
    *,
    on_ready: Callable[[str], None],
    make_source: Callable[[Vote], PictureSource] = open_source,
    meter: Meter | None = None,
) -> None:
    """Serves the campaign's page until SIGINT or SIGTERM; simulated people vote meanwhile.

    ``on_ready`` gets the link that people open. Raises UserError on a user's mistake.
    """
    from rlalign.web.listening import bound
    from rlalign.web.vote.serving import serve

    # what can be refused is refused before anything is loaded
    made = bound(vote.server.host, vote.server.port)
    try:
        vote = locate(vote)
        secret = secret_of(vote)
        with opened(vote, make_source(vote), say, meter) as served:
            stop = threading.Event()
            thread = simulate_beside(served, stop, say)

            def tell(url: str) -> None:
                on_ready(link_of(url, secret, vote))

            try:
                serve(served.desk, vote.server, secret, on_ready=tell, made=made)
            finally:
                stop.set()
                if thread is not None:
                    thread.join()
    finally:
        made.close()


def simulate_beside(served: Served, stop: threading.Event, say: Say) -> threading.Thread | None:
    """Simulated people in a thread, where they are asked for; until ``stop``."""
    if served.vote.simulate is None:
        return None
    people = people_of(served)

    def vote_all() -> None:
        given = people.run(over=lambda: stop.is_set() or served.queue.is_over)
        say(f"simulated people have given {given} votes")

    thread = threading.Thread(target=vote_all, name="simulated people", daemon=True)
    thread.start()
    return thread


def people_of(served: Served) -> Any:
    """The simulated people of a campaign."""
    from rlalign.voting.judges import Judge, People

    vote = served.vote
    assert vote.simulate is not None, "asked for"
    return People(
        store=served.store,
        campaign=vote.name,
        dealer=served.desk.dealer,
        judge=Judge(vote.simulate, vote.seed),
        poke=served.queue.poke,
    )


def secret_of(vote: Vote) -> Secret:
    """The page's secret, in a file beside the store (of a PostgreSQL store in ``runs/votes``)."""
    folder = Path("runs") / "votes" if "://" in vote.place else Path(vote.place).parent
    folder.mkdir(parents=True, exist_ok=True)
    return read_secret(folder / f".{vote.name}.secret")


def link_of(url: str, secret: Secret, vote: Vote) -> str:
    """What people open: a join link that everybody may use, or the page itself."""
    return join_url(url, secret.invitation(many=True)) if vote.server.with_token else url
