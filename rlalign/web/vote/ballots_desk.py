"""The desk over the store of ballots: pairs, rankings and blind comparisons from the items that the
store has, chains from pictures that a source has.

The next ballot is dealt together with the one that is open, so that its pictures can be fetched
before they are needed. A chain's next pair depends on the choice; of it the new picture is known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from secrets import token_urlsafe
from typing import Any, Protocol

from rlalign.ballots.deal import Deal
from rlalign.ballots.quality import Rules
from rlalign.ballots.records import Answer, Ballot, Item, Refused, Vote, digest
from rlalign.ballots.results import collect_results
from rlalign.ballots.store import Store
from rlalign.core.files import dump_json
from rlalign.web.vote.chain import Chain
from rlalign.web.vote.desk import (
    About,
    Choice,
    Declined,
    Notice,
    Progress,
    Receipt,
    Sheet,
    Waiting,
)
from rlalign.web.vote.people import MANY_PEOPLE

_STATUS = {
    "unknown_ballot": 404,
    "unknown_annotator": 401,
    "not_yours": 403,
    "left_out": 403,
    "deleted": 403,
    "bad_choice": 400,
    "expired": 410,
    "full": 409,
}
"""The store's reasons -> HTTP."""


@dataclass(frozen=True, kw_only=True)
class Supply:
    """How it stands with pictures that are still to come."""

    code: str = "empty"
    """What ``Waiting.code`` is where there is nothing to ask."""
    words: str = ""
    made: int = 0
    to_make: int = 0
    round: int | None = None
    votes: tuple[int, int] | None = None


class Source(Protocol):
    """Where pictures come from while people vote."""

    def prompts(self) -> Sequence[str]:
        """Prompts that a person may take the next of."""
        ...

    def uids(self, prompt: str) -> Sequence[str]:
        """Pictures of a prompt that are in the store, in a fixed order."""
        ...

    def ask(self, prompt: str) -> None:
        """Has pictures of a prompt made, where they can be."""
        ...

    def supply(self, prompt: str) -> Supply:
        """How it stands with pictures of a prompt, "" for all."""
        ...


@dataclass(frozen=True, kw_only=True)
class PictureList:
    """A source of pictures that are all there."""

    pictures: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Prompt -> uids."""

    def prompts(self) -> Sequence[str]:
        """See ``Source``."""
        return list(self.pictures)

    def uids(self, prompt: str) -> Sequence[str]:
        """See ``Source``."""
        return self.pictures.get(prompt, ())

    def ask(self, prompt: str) -> None:
        """See ``Source``."""

    def supply(self, prompt: str) -> Supply:
        """See ``Source``."""
        if prompt and prompt not in self.pictures:
            return Supply(code="broken", words=prompt)
        return Supply()


@dataclass(kw_only=True)
class BallotsDesk:
    """One campaign of a store as a desk (``desk.Desk``)."""

    store: Store
    campaign: str
    about: About
    source: Source = field(default_factory=PictureList)
    dealer: Deal = field(default_factory=Deal)
    votes_each: int = 0
    """Votes that a person is asked for; 0 has no end."""
    rules: Rules = field(default_factory=Rules)
    """Whom the results leave out."""
    anchor: str = ""
    """The policy whose strength is 0 in the results, "" for the one with most votes."""
    clock: Callable[[], float] = time.time
    notice: Notice = field(default_factory=Notice)
    _chains: dict[str, Chain] = field(default_factory=dict, init=False)
    _clips: dict[str, bool] = field(default_factory=dict, init=False)
    _turns: dict[str, threading.Lock] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    # --- people -----------------------------------------------------------------------------------

    def join(self, token: str, name: str, consent: str) -> str:
        """See ``Desk``. Without a token of one's own, each joining is a new person."""
        own = token and not token.startswith(MANY_PEOPLE)
        used = token if own else token_urlsafe(24)
        found = self._asked(self.store.join, name, used, consent, self.clock())
        return found.id

    def knows(self, annotator: str) -> bool:
        """See ``Desk``."""
        found = self.store.annotator(annotator)
        return found is not None and found.status != "deleted"

    @staticmethod
    def _asked(verb: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What a verb of the store gives; its refusals as ours."""
        try:
            return verb(*arguments, **named)
        except Refused as error:
            status = _STATUS.get(error.reason, 400)
            code = "join" if status == 401 else error.reason
            raise Declined(status, code, str(error)) from error

    # --- ballots ----------------------------------------------------------------------------------

    def ballot(self, annotator: str) -> Sheet | Waiting:
        """See ``Desk``."""
        with self._turn(annotator):
            given = self.store.given(self.campaign, annotator)
            if self.votes_each and given >= self.votes_each:
                return Waiting(code="empty", progress=self._progress(annotator, given, "empty"))
            now = self.clock()
            issue = (self.campaign, annotator, now, self.dealer)
            found = self._asked(self.store.issue, *issue)
            if self.about.mode == "chain":
                return self._in_chain(annotator, found, given)
            if found is None:
                return self._waiting(annotator, given, "")

            # the next one's pictures are fetched while this one is looked at
            last = self.votes_each and given + 1 >= self.votes_each
            following = None if last else self._asked(self.store.issue, *issue, ahead=1)
            ahead = following.shown if following is not None else ()
            return self._sheet(found, given, ahead)

    def _turn(self, annotator: str) -> threading.Lock:
        """One request of a person after the other: two tabs ask at the same time."""
        with self._lock:
            return self._turns.setdefault(annotator, threading.Lock())

    def _sheet(self, ballot: Ballot, given: int, ahead: Sequence[str], chain: int = 0) -> Sheet:
        return Sheet(
            ballot=ballot.id,
            mode=self.about.mode,
            prompt=ballot.item.caption,
            uids=ballot.shown,
            ahead=tuple(ahead),
            chain=chain,
            clips=frozenset(uid for uid in (*ballot.shown, *ahead) if self._is_clip(uid)),
            progress=self._progress(ballot.annotator, given, ""),
        )

    def _is_clip(self, uid: str) -> bool:
        """Whether a picture has several frames, which it keeps."""
        if uid not in self._clips:
            picture = self.store.picture(uid)
            self._clips[uid] = picture is not None and picture.frames > 1
        return self._clips[uid]

    def _waiting(self, annotator: str, given: int, prompt: str) -> Waiting:
        supply = self.source.supply(prompt)
        progress = self._progress(annotator, given, supply.code)
        return Waiting(code=supply.code, words=supply.words, progress=progress)

    def _progress(self, annotator: str, given: int, waiting: str) -> Progress:
        chain = self._chains.get(annotator)
        supply = self.source.supply(chain.prompt if chain else "")
        return Progress(
            done=given,
            of=self.votes_each,
            waiting=waiting,
            made=supply.made,
            to_make=supply.to_make,
            round=supply.round,
            votes=supply.votes,
        )

    def vote(self, annotator: str, choice: Choice) -> Receipt:
        """See ``Desk``."""
        answer = Answer(
            nonce=choice.nonce,
            choice=choice.choice,  # type: ignore[arg-type]  # checked by the store
            ranking=tuple((place,) for place in choice.ranking),
            reasons=self._known_reasons(choice.reasons),
            points=choice.points if self.about.points else (),
            visible_ms=float(choice.visible_ms),
            decide_ms=float(choice.decide_ms),
            device=choice.device,
        )
        if choice.choice not in self.about.allowed:
            raise Declined(400, "bad_choice", f"this page takes {', '.join(self.about.allowed)}")
        with self._turn(annotator):
            now = self.clock()
            vote = (annotator, choice.ballot, answer, now)
            receipt = self._asked(self.store.vote, *vote)
            ballot = self.store.ballot(choice.ballot)
            assert ballot is not None, "it was voted on"
            chain = self._chains.get(annotator)
            if chain is not None and receipt.outcome == "recorded":
                chain.follow(Vote(seq=receipt.seq, ballot=ballot, answer=answer, at=now))
        return Receipt(status=receipt.outcome, names=self._names(ballot, choice))

    def _known_reasons(self, reasons: Sequence[str]) -> tuple[str, ...]:
        if not set(reasons) <= set(self.about.reasons):
            known = ", ".join(self.about.reasons) or "no reasons"
            raise Declined(400, "bad_choice", f"this page takes {known} as reasons")
        return tuple(reasons)

    def _names(self, ballot: Ballot, choice: Choice) -> tuple[str, ...]:
        """The policies of a ballot's pictures, once it is voted on."""
        if not self.about.names_after or choice.choice == "skip":
            return ()
        pictures = [self.store.picture(uid) for uid in ballot.shown]
        return tuple(picture.policy if picture else "" for picture in pictures)

    def undo(self, annotator: str, nonce: str) -> bool:
        """See ``Desk``."""
        with self._turn(annotator):
            found = self._asked(self.store.undo, self.campaign, annotator, nonce, self.clock())
            if found is not None and self.about.mode == "chain":
                # the pair that the choice led to is asked no more
                self.store.withdraw_own(self.campaign, annotator, found.item.id)
            self._chains.pop(annotator, None)
            return found is not None

    def picture(self, uid: str) -> bytes:
        """See ``Desk``."""
        content = self.store.content(uid)
        if content is None:
            raise Declined(404, "picture", "this picture is not kept any more")
        return content

    def progress(self, annotator: str) -> Progress:
        """See ``Desk``. Deals nothing."""
        return self._progress(annotator, self.store.given(self.campaign, annotator), "")

    # --- chains -----------------------------------------------------------------------------------

    def prompt(self, annotator: str, text: str) -> None:
        """See ``Desk``."""
        if self.about.mode != "chain":
            raise Declined(409, "typing", "this page takes no prompts of your own")
        with self._turn(annotator):
            chain = self._chain(annotator)
            text = text or self._next_prompt(chain.prompt)
            if not text:
                raise Declined(409, "prompts", "there is no list of prompts; type one")
            if text != chain.prompt:
                self.store.withdraw_own(self.campaign, annotator)
            self.store.add_prompt(self.campaign, annotator, text, self.clock())
            self._chains.pop(annotator, None)
            self.source.ask(text)

    def _next_prompt(self, before: str) -> str:
        """The prompt after this one in the list, the first after the last."""
        first = ""
        found = False
        for prompt in self.source.prompts():
            if found:
                return str(prompt)
            first = first or str(prompt)
            found = prompt == before
        return first

    def _chain(self, annotator: str) -> Chain:
        """Where a person is, read off the log where this process does not know."""
        found = self._chains.get(annotator)
        if found is not None:
            return found
        prompts = self.store.prompts(self.campaign, annotator)
        chosen_at, prompt = prompts[-1] if prompts else (0, "")
        chain = Chain(prompt=prompt, chosen_at=chosen_at)
        if prompt:
            for vote in self.store.votes(self.campaign):
                if vote.ballot.annotator == annotator:
                    chain.follow(vote)
        self._chains[annotator] = chain
        return chain

    def _in_chain(self, annotator: str, found: Ballot | None, given: int) -> Sheet | Waiting:
        """The open ballot, else the winner beside a picture that this person has not seen."""
        chain = self._chain(annotator)
        if not chain.prompt:
            if self.about.typing:
                return Waiting(code="prompt", progress=self._progress(annotator, given, "prompt"))
            self.store.add_prompt(self.campaign, annotator, self._next_prompt(""), self.clock())
            self._chains.pop(annotator, None)
            chain = self._chain(annotator)
        shown = found.shown if found else ()
        new = [u for u in self.source.uids(chain.prompt) if u not in (*chain.seen, *shown)]
        if found is None:
            pair = ([chain.winner] if chain.winner else []) + new
            if len(pair) < 2:
                self.source.ask(chain.prompt)
                return self._waiting(annotator, given, chain.prompt)
            self.store.add_items([self._link(annotator, chain, pair[:2])])
            now = self.clock()
            found = self._asked(self.store.issue, self.campaign, annotator, now, self.dealer)
            assert found is not None, "an item was added"
            new = [uid for uid in new if uid not in pair[:2]]
        return self._sheet(found, given, new[:2], chain.length)

    def _link(self, annotator: str, chain: Chain, pair: Sequence[str]) -> Item:
        key = (self.campaign, annotator, self.store.cursor(), token_urlsafe(8))
        return Item(
            id=digest("chain", *key),
            campaign=self.campaign,
            caption=chain.prompt,
            uids=tuple(pair),
            annotator=annotator,
            rule="winner",
            target=1,
        )

    # --- results ----------------------------------------------------------------------------------

    def results(self) -> Mapping[str, Any]:
        """See ``Desk``."""
        now = self.clock()
        found = collect_results(self.store, self.campaign, now, self.rules, self.anchor)
        return found.to_json()

    def export(self) -> Iterator[str]:
        """See ``Desk``."""
        for vote in self.store.votes(self.campaign):
            ballot = vote.ballot
            yield dump_json({**asdict(vote), "shown": list(ballot.shown)})
