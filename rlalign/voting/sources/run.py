"""The policy of a run that is still learning: its newest checkpoint draws what people are asked.

    the run: learns from the votes since the round before, writes a checkpoint, waits
    this:    draws under it, people vote, the run goes on

With ``per_round`` the two take turns: so many pairs under each checkpoint, and the page waits for
the next one ("learning"). Then the numbers of the run do not depend on how fast anybody is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.voting.pictures import Exhausted, Pending, PictureFile
from rlalign.voting.sources.policy import LISTED, TYPED, draw_rows

_BATCHES = 10_000
"""Of one round, at most: a batch's number is this times the round and its number in it."""

if TYPE_CHECKING:
    import torch

    from rlalign.config import Run
    from rlalign.engine import Engine
    from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What draws under a run's weights."""

    engine: Engine
    set_weights: Callable[[Mapping[str, torch.Tensor]], None]


MakeDrawing = Callable[["Run", int], Drawing]
"""(run, pictures in a piece of work) -> what draws, under the weights that the policy loads."""


@dataclass(kw_only=True)
class RunSource:
    """Pictures by the newest checkpoint of a run folder, the base policy before the first."""

    folder: Path
    seed: int
    count: int
    """Pictures of a caption."""
    rows: int
    per_round: int = 0
    """Groups under one checkpoint; 0 has no end."""
    prompts_of: Prompts | None = None
    """None takes the run's own."""
    draws: bool = True
    make_drawing: MakeDrawing = lambda run, rows: draw_here(run, rows)
    """Where the run's policy draws: in this process, or on a cluster."""
    release: Callable[[], None] = lambda: None
    """Lets go of what draws."""
    _run: Run | None = field(default=None, init=False)
    _drawing: Drawing | None = field(default=None, init=False)
    _loaded: int = field(default=-1, init=False)
    _made: int = field(default=0, init=False)
    """Groups under the loaded checkpoint so far."""
    _next: int = field(default=0, init=False)
    """Batches under it so far."""

    # --- how the run stands ----------------------------------------------------------------------

    @property
    def round(self) -> int | None:
        """See ``PictureSource``: the round that the run does next, or does now."""
        return self.newest + 1

    @property
    def votes(self) -> tuple[int, int] | None:
        """See ``PictureSource``."""
        from rlalign.alignment.cursors import read_cursors

        refit = self._run.refit if self._run is not None else None
        number = self.newest // (refit.every if refit is not None else 1)
        cursors = read_cursors(self.folder)
        if number >= len(cursors):
            return None
        first = 1 + (cursors[number - 1] if number else 0)
        return (first, cursors[number]) if first <= cursors[number] else None

    @property
    def newest(self) -> int:
        """The round of the newest checkpoint; 0 for the base policy."""
        from rlalign.learning.checkpoint import newest_round

        return newest_round(self.folder)

    def state(self) -> str:
        """The run's own word for how it stands; "" where it has not begun."""
        from rlalign.alignment.control import status_of

        try:
            return str(status_of(self.folder)["state"])
        except UserError:
            return ""

    def refuse_ended(self) -> None:
        """Raises Exhausted where the run is over, and Pending where it has not begun."""
        if not (self.folder / "config.yaml").is_file():
            raise Pending(
                "broken", f"the run {self.folder.name} has not begun; rlalign train begins it"
            )
        if self.state() == "ended":
            raise Exhausted

    # --- pictures --------------------------------------------------------------------------------

    def prompts(self) -> Sequence[str]:
        """See ``PictureSource``."""
        found = self.prompts_of or (self._run.prompts if self._run is not None else None)
        return found.pool() if found is not None else []

    @property
    def renewed(self) -> bool:
        """See ``PictureSource``."""
        return self._loaded >= 0 and self.newest != self._loaded

    def take_up(self, plans: Iterator[Mapping[str, Any]]) -> None:
        """See ``PictureSource``: how much there is under the newest checkpoint."""
        if not (self.folder / "config.yaml").is_file():
            return
        self._load()
        for plan in plans:
            if plan.get("round") != self._loaded:
                break
            self._next = max(self._next, plan["batch"] % _BATCHES + 1)
            self._made += 1

    def batch(self) -> list[list[PictureFile]]:
        """See ``PictureSource``."""
        self.refuse_ended()
        self._load()
        if self.per_round and self._made >= self.per_round:
            raise Pending("learning")
        assert self._run is not None
        prompts = self.prompts_of or self._run.prompts

        # a batch of each round, and of each number within it, is of other prompts; all pairs of a
        # round come at once where there are so many and no more
        place = self._loaded * _BATCHES + self._next
        self._next += 1
        captions: list[str] = []
        wanted = self.per_round - self._made if self.per_round else prompts.per_round
        while len(captions) < wanted:
            drawn = prompts.draw(self.seed, place + len(captions))
            captions += [text for _, text in drawn]
        captions = captions[:wanted]
        self._made += wanted
        rows = [
            (prompt_id(caption), caption, number * self.count + sample)
            for number, caption in enumerate(captions)
            for sample in range(self.count)
        ]
        return self._drawn(UnitKey(LISTED, place, 0), rows)

    def of_prompt(self, prompt: str, number: int) -> list[PictureFile]:
        """See ``PictureSource``."""
        self.refuse_ended()
        self._load()
        first = number * self.count
        rows = [(prompt_id(prompt), prompt, first + s) for s in range(self.count)]
        return self._drawn(UnitKey(TYPED, self._loaded, 0), rows)[0]

    def close(self) -> None:
        """See ``PictureSource``."""
        self.release()

    def _drawn(self, key: UnitKey, rows: list[tuple[int, str, int]]) -> list[list[PictureFile]]:
        assert self._drawing is not None
        unit = Unit.of_rows(key, rows, self.seed, self._plan)
        title = f"{self.folder.name}@{self._loaded}"
        drawn = draw_rows(self._drawing.engine, unit, {"round": self._loaded})
        named = [one.named(title) for one in drawn]
        return [named[at : at + self.count] for at in range(0, len(named), self.count)]

    @property
    def _plan(self) -> Plan:
        assert self._run is not None
        return self._run.plan

    def _load(self) -> None:
        """Takes up the newest checkpoint, where there is one that was not taken up yet."""
        newest = self.newest
        if newest == self._loaded:
            return
        if self._drawing is None:
            from rlalign.config import load_begun

            self._run = load_begun(self.folder / "config.yaml")
            self._drawing = self.make_drawing(self._run, self.rows)
        while newest:
            weights = self._weights()
            # the run may have written a newer one while this was read
            read, newest = newest, self.newest
            if read == newest:
                self._drawing.set_weights(weights)
                break
        self._loaded = newest
        self._made = 0
        self._next = 0

    def _weights(self) -> dict[str, Any]:
        from rlalign.learning import checkpoint

        return dict(checkpoint.read_weights(self.folder, "policy"))


def draw_here(run: Run, rows: int) -> Drawing:
    """A run's policy in this process."""
    from rlalign.engine.local import LiveRewards, LocalEngine
    from rlalign.networks.devices import usable

    policy: Policy = run.policy.load(usable(run.runtime.device, "runtime.device"))
    engine = LocalEngine.with_lanes(
        policy,
        lambda: LiveRewards(()),
        workers=1,
        rows=rows,
        threads=run.runtime.rollout.threads,
    )
    return Drawing(engine=engine, set_weights=lambda weights: policy.set_weights(dict(weights)))
