"""A picture with its bytes, and what a source of pictures is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlalign.ballots.records import Picture, picture_uid


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture or clip: its row in a store, and its file's bytes."""

    picture: Picture
    content: bytes
    caption: str
    """As it was drawn by, with its record, where it has one."""

    @classmethod
    def of(cls, content: bytes, caption: str, **facts: Any) -> PictureFile:
        """The file of these bytes, which name the picture; ``facts`` are the other fields of
        ``Picture``."""
        picture = Picture(uid=picture_uid(content), caption=str(caption), **facts)
        return cls(picture=picture, content=content, caption=caption)

    def named(self, policy: str) -> PictureFile:
        """The same, made by ``policy``."""
        return replace(self, picture=replace(self.picture, policy=policy))


class Exhausted(Exception):
    """A source has no further pictures."""


class Pending(Exception):
    """A source has no pictures now; the code is one of ``web.vote.desk.Waiting``, the words say
    why."""

    def __init__(self, code: str, words: str = "") -> None:
        super().__init__(words or code)
        self.code = code


class PictureSource(Protocol):
    """Where pictures come from. One thread asks it."""

    draws: bool
    """Whether it can make pictures of any prompt."""

    @property
    def round(self) -> int | None:
        """The round of training that its pictures' votes teach; None where no run learns."""
        ...

    @property
    def votes(self) -> tuple[int, int] | None:
        """The first and the last vote, by their numbers in the log, that this round takes beyond
        those of earlier ones; None until the round has begun."""
        ...

    def prompts(self) -> Sequence[str]:
        """Captions that a person may take the next of."""
        ...

    def take_up(self, plans: Iterator[Mapping[str, Any]]) -> None:
        """Goes on after what an earlier process has made: of each item the plan of its first
        picture, the newest first."""
        ...

    @property
    def renewed(self) -> bool:
        """Whether it would draw otherwise now than it did: a run has learned meanwhile."""
        ...

    def batch(self) -> list[list[PictureFile]]:
        """Pictures of each caption of the next batch, which depend on its number alone (of a run
        that learns: on its round too).

        Of a blind comparison the two sides alternate. Raises Exhausted where there are no more,
        Pending where there are none now, UserError where pictures cannot be made.
        """
        ...

    def of_prompt(self, prompt: str, number: int) -> list[PictureFile]:
        """Pictures of one prompt, other ones for each number. Raises as ``batch`` does."""
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...
