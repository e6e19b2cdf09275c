"""Pictures that a policy draws when they are needed.

Noise is keyed by (seed, batch, prompt, sample), and a picture's row in the store says all of that
and which others it was drawn with: the same policy draws it again, bit for bit (``redraw``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlalign.ballots.records import Picture
from rlalign.core.clips import RATE, encode_clip
from rlalign.core.prompts import record_of
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.voting.pictures import PictureFile

if TYPE_CHECKING:
    from rlalign.alignment.models import Model
    from rlalign.engine import Engine
    from rlalign.voting.settings import Vote

LISTED = "vote"
TYPED = "vote-prompt"
"""Streams of noise: of the campaign's prompts by batch, and of a prompt that a person asked for."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A policy that draws: the whole source, or one side of a blind comparison."""

    title: str
    engine: Engine


@dataclass(kw_only=True)
class EngineSource:
    """Pictures by one policy or two, on an engine of this process or of a cluster."""

    sides: Sequence[Side]
    prompts_of: Prompts
    plan: Plan
    seed: int
    count: int
    """Pictures of a caption; of two sides each draws half of them."""
    draws: bool = True
    renewed: bool = False
    round: int | None = None
    votes: tuple[int, int] | None = None
    release: Callable[[], None] = lambda: None
    """Lets go of the engines."""
    _next: int = field(default=0, init=False)

    @classmethod
    def of(
        cls, vote: Vote, sides: Sequence[Side], release: Callable[[], None] = lambda: None
    ) -> EngineSource:
        """The pictures that a vote asks for."""
        assert vote.prompts is not None, "checked by the settings"
        return cls(
            sides=sides,
            prompts_of=vote.prompts,
            plan=vote.source.plan,
            seed=vote.seed,
            count=vote.per_caption,
            release=release,
        )

    def prompts(self) -> Sequence[str]:
        """See ``PictureSource``."""
        return self.prompts_of.pool()

    def take_up(self, plans: Iterator[Mapping[str, Any]]) -> None:
        """See ``PictureSource``."""
        self._next = int(next(plans, {}).get("batch", -1)) + 1

    def batch(self) -> list[list[PictureFile]]:
        """See ``PictureSource``."""
        number = self._next
        self._next += 1
        captions = [text for _, text in self.prompts_of.draw(self.seed, number)]
        return self.draw(UnitKey(LISTED, number, 0), list(dict.fromkeys(captions)), 0)

    def of_prompt(self, prompt: str, number: int) -> list[PictureFile]:
        """See ``PictureSource``."""
        first = number * self._of_side
        return self.draw(UnitKey(TYPED, 0, 0), [prompt], first)[0]

    def close(self) -> None:
        """See ``PictureSource``."""
        self.release()

    @property
    def _of_side(self) -> int:
        return -(-self.count // len(self.sides))

    def draw(self, key: UnitKey, captions: Sequence[str], first: int) -> list[list[PictureFile]]:
        """The group of each caption, samples from number ``first`` on."""
        made: list[list[list[PictureFile]]] = []
        for index, side in enumerate(self.sides):
            # two sides never share noise
            own = key._replace(index=index, stream=key.stream + ("/other" if index else ""))
            samples = range(first, first + self._of_side)
            rows = [(prompt_id(text), text, sample) for text in captions for sample in samples]
            drawn = draw_rows(side.engine, Unit.of_rows(own, rows, self.seed, self.plan))
            cut = range(0, len(drawn), self._of_side)
            made.append([self._named(side, drawn[at : at + self._of_side]) for at in cut])
        groups = []
        for parts in zip(*made, strict=True):
            groups.append([one for some in zip(*parts, strict=True) for one in some])
        return groups

    def _named(self, side: Side, drawn: Sequence[PictureFile]) -> list[PictureFile]:
        return [one.named(side.title) for one in drawn]


def models_of(vote: Vote) -> list[Model]:
    """The policy of a campaign, or the two that are compared. Raises UserError where there is
    none."""
    from rlalign.alignment.models import Model, find_model

    found = []
    for place, named in (
        ("source.policy", vote.source.policy),
        ("source.against", vote.source.against),
    ):
        if isinstance(named, str):
            found.append(find_model(named, place))
        elif named is not None:
            found.append(Model(title=named.name, recipe=named))
    return found


def draw_rows(
    engine: Engine, unit: Unit, facts: Mapping[str, Any] | None = None
) -> list[PictureFile]:
    """The pictures of a unit's rows, each with what it takes to draw it again. ``facts`` join it.

    Raises UserError where the policy cannot draw them.
    """
    from rlalign.engine.pieces import Pictures

    # the piece that a picture is drawn in belongs to what it is
    count = len(unit.prompts)
    pieces = [
        unit.take(range(at, min(at + engine.rows, count))) for at in range(0, count, engine.rows)
    ]
    works = [Pictures(unit=piece, version=0) for piece in pieces]
    found: list[PictureFile] = []
    for piece, media_BFCHW in zip(pieces, engine.map(works), strict=True):
        said = {**_facts_of(piece), **(facts or {})}
        for row, media_FCHW in enumerate(media_BFCHW):
            content, kind = encode_clip(media_FCHW)
            record = dict(record_of(piece.prompts[row]))
            found.append(
                PictureFile.of(
                    content,
                    caption=piece.prompts[row],
                    seed=piece.seed,
                    plan={**said, "row": row, **({"record": record} if record else {})},
                    frames=len(media_FCHW),
                    media_type=kind,
                    rate=RATE if len(media_FCHW) > 1 else 0.0,
                )
            )
    return found


def _facts_of(piece: Unit) -> dict[str, Any]:
    facts = {
        "plan": piece.plan.model_dump(),
        "stream": piece.key.stream,
        "batch": piece.key.round,
        "side": piece.key.index,
        "prompts": [str(prompt) for prompt in piece.prompts],
        "samples": list(piece.sample_ids),
    }
    # the text alone does not say the number of a prompt with a record
    has_record = any(record_of(prompt) for prompt in piece.prompts)
    return {**facts, "prompt_ids": list(piece.prompt_ids)} if has_record else facts


def redraw(picture: Picture, engine: Engine) -> bytes:
    """A picture's file, drawn again from its row by the policy that drew it."""
    plan = picture.plan
    numbers = plan.get("prompt_ids") or [prompt_id(text) for text in plan["prompts"]]
    rows = list(zip(numbers, plan["prompts"], plan["samples"], strict=True))
    key = UnitKey(plan["stream"], plan["batch"], plan["side"])
    unit = Unit.of_rows(key, rows, picture.seed, Plan.model_validate(plan["plan"]))
    assert len(rows) <= engine.rows, "an engine cuts no piece that was one"
    return draw_rows(engine, unit)[plan["row"]].content
