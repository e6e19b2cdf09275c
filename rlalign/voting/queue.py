"""Keeps pairs ahead of those who vote: a thread that asks a source for more where few are left.

    people --vote--> store <--stock-- queue --batch--> source (files, a policy, a cluster)
                       ^----------- items, pictures ----'

It takes: how many items wait, what people typed. It gives: items in the store, and a ring of the
page's bell. It waits for: pictures, and while there are enough, for a poke or a second.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlalign.ballots.records import Stock
from rlalign.ballots.store import Store
from rlalign.core.registry import UserError
from rlalign.voting.pairing import Pairing
from rlalign.voting.pictures import Exhausted, Pending, PictureFile, PictureSource
from rlalign.voting.settings import Vote
from rlalign.web.vote.ballots_desk import Supply

LEARNED = ("live", "shared")
"""Kinds of items that are kept ahead; gold items come along."""

WAIT_SECONDS = 1.0
"""Between two looks at the store."""
AGAIN_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""After pictures could not be made: how long until they are tried again."""

Keep = Callable[[Sequence[PictureFile]], Sequence[PictureFile]]
"""Of a caption's pictures those that may be shown."""


class Meter(Protocol):
    """Is told how a campaign stands."""

    def note_stock(self, stock: Stock) -> None:
        """What there is to ask, and what was answered; now and then."""
        ...

    def note_drawing(self, seconds: float) -> None:
        """How long a batch of pictures took."""
        ...


def keep_all(group: Sequence[PictureFile]) -> Sequence[PictureFile]:
    """A ``Keep`` where nothing is held back."""
    return group


def _drawing() -> Supply:
    return Supply(code="drawing")


@dataclass(kw_only=True)
class Queue:
    """The items of one campaign, made ahead. ``start`` begins, ``close`` ends."""

    store: Store
    vote: Vote
    source: PictureSource
    pairing: Pairing
    keep: Keep = keep_all
    watch: Callable[[Sequence[PictureFile]], None] = lambda made: None
    """Told of the pictures of a caption that are kept."""
    refresh: Callable[[], None] = lambda: None
    """Called now and then, for what follows from new votes."""
    ring: Callable[[], None] = lambda: None
    """Called when something may have changed for those who wait."""
    meter: Meter | None = None
    say: Callable[[str], None] = lambda words: None
    """Told of what goes wrong, once each time that it does."""
    clock: Callable[[], float] = time.time
    _state: Supply = field(default_factory=_drawing, init=False)
    _typed: dict[str, list[str]] = field(default_factory=dict, init=False)
    """Prompt that somebody asked for -> the uids of its pictures."""
    _tries: Counter[str] = field(default_factory=Counter, init=False)
    """Prompt -> how often pictures of it were made."""
    _waiting: list[str] = field(default_factory=list, init=False)
    """Items under the weights that draw now."""
    _asked: list[str] = field(default_factory=list, init=False)
    _broken: dict[str, str] = field(default_factory=dict, init=False)
    """Prompt -> why it has no pictures."""
    _failures: int = field(default=0, init=False)
    _over: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _poked: threading.Event = field(default_factory=threading.Event, init=False)
    _ending: bool = field(default=False, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Begins to work, after what an earlier process has made."""
        self._take_up()
        self._thread = threading.Thread(target=self._work, name="pictures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends after the batch in hand."""
        self._ending = True
        self._poked.set()
        if self._thread is not None:
            self._thread.join()
        self.source.close()

    def poke(self) -> None:
        """Has the thread look at once."""
        self._poked.set()

    # --- what the page asks (``web.vote.ballots_desk.Source``) -----------------------------------

    def prompts(self) -> Sequence[str]:
        """Prompts that a person may take the next of."""
        return self.source.prompts()

    def uids(self, prompt: str) -> Sequence[str]:
        """Pictures of a prompt that somebody asked for."""
        with self._lock:
            return list(self._typed.get(prompt, ()))

    def ask(self, prompt: str) -> None:
        """Has more pictures of a prompt made."""
        with self._lock:
            if prompt not in self._asked and prompt not in self._broken:
                self._asked.append(prompt)
        self.poke()

    def supply(self, prompt: str) -> Supply:
        """How it stands with pictures of a prompt, "" for all."""
        with self._lock:
            state = self._state
            why = self._broken.get(prompt)
            asked = prompt in self._asked
        if prompt and why is not None:
            return replace(state, code="broken", words=why, made=0, to_make=0)
        if prompt and asked and state.code == "empty":
            return replace(state, code="drawing", to_make=self.vote.per_caption)
        return state

    @property
    def is_over(self) -> bool:
        """Whether no more items will be made."""
        return self._over

    # --- the thread ------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Has the source go on where an earlier process has left off."""
        items = [item for item in self.store.items(self.vote.name) if not item.annotator]
        learned = [item for item in items if item.kind in LEARNED]
        pictures = (self.store.picture(item.uids[0]) for item in reversed(learned))
        self.source.take_up(picture.plan for picture in pictures if picture is not None)
        self._waiting = [item.id for item in learned]

    def _work(self) -> None:
        try:
            while not self._ending:
                self._poked.clear()
                pause = self._pause_after_turn()
                if pause:
                    self._poked.wait(pause)
        finally:
            # a fault of ours leaves a traceback in the log, and nobody waiting for ever
            if not self._ending:
                self._set(Supply(code="broken", words="the server's log says why"))

    def _pause_after_turn(self) -> float:
        """Makes something; how long to wait before the next time."""
        try:
            worked = self._one_turn()
        except (UserError, OSError, RuntimeError) as error:
            said = isinstance(error, UserError)
            return self._note_failure(str(error) if said else f"{type(error).__name__}: {error}")
        self._failures = 0
        return 0.0 if worked else WAIT_SECONDS

    def _note_failure(self, words: str) -> float:
        """Says on the page and here why there are no pictures; how long to wait."""
        if self._state.words != words:
            self.say(f"no pictures: {words}")
        self._set(self._supply(code="broken", words=words))
        pause = AGAIN_SECONDS[min(self._failures, len(AGAIN_SECONDS) - 1)]
        self._failures += 1
        return pause

    def _one_turn(self) -> bool:
        """Makes what is most wanted; whether there was something to make."""
        self.refresh()
        stock = self.store.stock(self.vote.name, self.clock())
        if self.meter is not None:
            self.meter.note_stock(stock)
        if self._answer_typed():
            return True
        if self.vote.mode == "chain":
            self._set(self._supply(code="empty"))
            return False
        waiting = stock.items.get("live", 0) + stock.items.get("shared", 0)
        if self._over or (waiting > self.vote.low and not self.source.renewed):
            self._set(self._supply(code="empty" if self._over else "drawing"))
            return False
        return self._make_batch(waiting)

    def _make_batch(self, waiting: int) -> bool:
        missing = max(self.vote.ahead - waiting, 1)
        self._set(self._supply(code="drawing", to_make=missing))
        renewed = self.source.renewed
        began = time.monotonic()
        try:
            groups = self.source.batch()
        except Exhausted:
            self._over = True
            self._set(self._supply(code="empty"))
            return False
        except Pending as error:
            self._set(self._supply(code=error.code, words=str(error)))
            return False
        if self.meter is not None:
            self.meter.note_drawing(time.monotonic() - began)
        if renewed:
            # nobody is asked any more about pictures of older weights
            self.store.withdraw_items(self._waiting)
            self._waiting = []
        self._add(groups)
        self._set(self._supply(made=len(groups), to_make=missing))
        return True

    def _add(self, groups: Sequence[Sequence[PictureFile]]) -> None:
        """Pictures and items into the store; what a filter holds back is in neither."""
        kept = [list(self.keep(group)) for group in groups]
        kept = [group for group in kept if len(group) >= self.vote.per_item]
        for group in kept:
            self.watch(group)
            for made in group:
                self.store.add_picture(made.picture, made.content)
        items = self.pairing.items(kept)
        self.store.add_items(items)
        self._waiting += [item.id for item in items if item.kind in LEARNED]

    def _answer_typed(self) -> bool:
        """Pictures of the prompt that was asked for first."""
        with self._lock:
            prompt = self._asked[0] if self._asked else ""
            there = self._typed.setdefault(prompt, []) if prompt else []
        if not prompt:
            return False
        try:
            made = self.keep(self.source.of_prompt(prompt, self._tries[prompt]))
            self._tries[prompt] += 1
        except Exhausted:
            made = []
            if not there:
                self._broken[prompt] = f"there are no pictures of {prompt!r}"
        except Pending as error:
            self._set(self._supply(code=error.code, words=str(error)))
            return False
        for one in made:
            self.store.add_picture(one.picture, one.content)
        with self._lock:
            there.extend(one.picture.uid for one in made if one.picture.uid not in there)
            self._asked.remove(prompt)
        self.ring()
        return True

    def _supply(self, **more: Any) -> Supply:
        return Supply(round=self.source.round, votes=self.source.votes, **more)

    def _set(self, state: Supply) -> None:
        with self._lock:
            changed = state != self._state
            self._state = state
        if changed:
            self.ring()
