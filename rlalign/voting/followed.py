"""The policy of a run that is still learning: its newest checkpoint draws what people are asked.

    the run: learns from the votes since the round before, writes a checkpoint, waits
    this:    draws under it, people vote, the run goes on

With ``per_round`` the two take turns: so many pairs under each checkpoint, and the page waits for
the next one ("learning"). Then the numbers of the run do not depend on how fast anybody is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.voting.drawn import LISTED, TYPED, draw_rows
from rlalign.voting.made import Exhausted, Made, Pending

_BATCHES = 10_000
"""Of one round, at most: a batch's number is this times the round and its number in it."""

if TYPE_CHECKING:
    from rlalign.config import Run
    from rlalign.engine.local import LocalEngine
    from rlalign.policies.base import Policy


@dataclass(kw_only=True)
class FollowedSource:
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
    _run: Run | None = field(default=None, init=False)
    _policy: Policy | None = field(default=None, init=False)
    _engine: LocalEngine | None = field(default=None, init=False)
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
            raise Pending("learning", f"the run {self.folder} has not begun")
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

    def batch(self) -> list[list[Made]]:
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

    def of_prompt(self, prompt: str, number: int) -> list[Made]:
        """See ``PictureSource``."""
        self.refuse_ended()
        self._load()
        first = number * self.count
        rows = [(prompt_id(prompt), prompt, first + s) for s in range(self.count)]
        return self._drawn(UnitKey(TYPED, self._loaded, 0), rows)[0]

    def close(self) -> None:
        """See ``PictureSource``."""

    def _drawn(self, key: UnitKey, rows: list[tuple[int, str, int]]) -> list[list[Made]]:
        assert self._engine is not None
        unit = Unit.of_rows(key, rows, self.seed, self._plan)
        title = f"{self.folder.name}@{self._loaded}"
        drawn = draw_rows(self._engine, unit, {"round": self._loaded})
        named = [Made(**{**vars(one), "policy": title}) for one in drawn]
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
        if self._policy is None:
            self._begin()
        policy: Any = self._policy
        while newest:
            weights = self._weights()
            # the run may have written a newer one while this was read
            read, newest = newest, self.newest
            if read == newest:
                policy.set_weights(weights)
                break
        self._loaded = newest
        self._made = 0
        self._next = 0

    def _begin(self) -> None:
        from rlalign.config import load_begun
        from rlalign.engine.local import LiveRewards, LocalEngine
        from rlalign.networks.devices import usable

        self._run = load_begun(self.folder / "config.yaml")
        runtime = self._run.runtime
        self._policy = self._run.policy.load(usable(runtime.device, "runtime.device"))
        self._engine = LocalEngine.with_lanes(
            self._policy,
            lambda: LiveRewards(()),
            workers=1,
            rows=self.rows,
            threads=runtime.rollout.threads,
        )

    def _weights(self) -> dict[str, Any]:
        from rlalign.learning import checkpoint

        tensors = checkpoint.read_tensors(self.folder)
        found = {
            n.removeprefix("policy/"): t for n, t in tensors.items() if n.startswith("policy/")
        }
        assert found, "a checkpoint holds a policy"
        return found
