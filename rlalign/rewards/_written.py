"""What the rewards of written text share: the wanted text of a prompt, and how much of it was
read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from rlalign.core.media import as_uint8, to_image
from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer

if TYPE_CHECKING:
    from PIL.Image import Image

Reader = Callable[[Sequence["Image"]], Sequence[str]]
"""Pictures in 8-bit RGB -> the text that each shows, "" where it shows none."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class WrittenText(Reward):
    """Base of a reward that reads: ``reader`` gives the engine that does."""

    field: str = Field(
        default="text",
        description=(
            "name in a prompt's record under which its wanted text stands; a prompt without it says"
            " it in double quotes"
        ),
    )
    contains: bool = Field(
        default=False,
        description="whether a longer text that contains the wanted one counts as all of it",
    )
    zoom: float = Field(
        default=1.0,
        gt=0.0,
        le=16.0,
        allow_inf_nan=False,
        description="factor by which pictures are enlarged (bicubic) before they are read",
    )
    detect: bool = Field(
        default=True,
        description="whether lines of text are looked for; false: the whole picture is one line",
    )
    threads: int = Field(
        default=1, ge=1, description="threads of the engine; with 1 the scores repeat bit for bit"
    )

    def reader(self) -> Reader:
        """The live engine. A missing package or program is a UserError."""
        raise NotImplementedError

    def load(self, device: str) -> Scorer:
        """The scorer; it works on the CPU wherever the media are. A clip's score is the mean over
        its frames."""
        read = self.reader()

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            wanted = [wanted_text(p, self.field, f"rewards.{self.title}") for p in prompts]
            frames = media_BFCHW.shape[1]
            pictures = [
                self._enlarged(to_image(frame)) for clip in as_uint8(media_BFCHW) for frame in clip
            ]
            score_N = [
                share_read(text, wanted[n // frames], contains=self.contains)
                for n, text in enumerate(read(pictures))
            ]
            return torch.tensor(score_N, dtype=torch.float32).reshape(-1, frames).mean(dim=1)

        return scorer

    def _enlarged(self, picture: Image) -> Image:
        from PIL import Image

        if self.zoom == 1.0:
            return picture
        width, height = (max(1, round(side * self.zoom)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)


def wanted_text(prompt: str, field: str, place: str) -> str:
    """The text that a prompt asks for: that of its record's ``field``, or else the first in double
    quotes. A prompt that says none is a UserError that names it."""
    # the record is asked first
    recorded = record_of(prompt).get(field)
    if recorded is not None:
        if not isinstance(recorded, str) or not plain_text(recorded):
            raise UserError(
                f"{place}.field: the record of prompt {str(prompt)!r} must hold the wanted text"
                f" under {field!r}, got {recorded!r}"
            )
        return recorded

    # then the prompt's own words
    found = _QUOTED.search(prompt)
    quoted = (found[1] or found[2] or "") if found else ""
    if not plain_text(quoted):
        raise UserError(
            f"{place}: prompt {str(prompt)!r} does not say which text the picture shall show; write"
            f" it in double quotes, or in the prompt's record under {field!r}"
        )
    return quoted


def plain_text(text: str) -> str:
    """A text as it is compared: without white space, case folded, accents composed."""
    return unicodedata.normalize("NFC", "".join(text.split()).casefold())


def share_read(text: str, wanted: str, *, contains: bool = False) -> float:
    """1 - min(d, n) / n, 0 to 1: n letters are wanted, and d is the edit distance of ``text`` to
    them, both without white space and case folded.

    With ``contains`` it is 1 wherever the wanted text stands within the other.

    Source: Liu 2025, arXiv:2505.05470 (Flow-GRPO), on rendered text; its code has ``contains``
    for pictures and not for clips.
    """
    read = plain_text(text)
    asked = plain_text(wanted)
    if contains and asked in read:
        return 1.0
    return 1.0 - min(edit_distance(read, asked), len(asked)) / len(asked)


def edit_distance(first: str, second: str) -> int:
    """The least number of letters to insert, delete or replace that makes one text of the other
    (Levenshtein's distance)."""
    distance_J = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        # one row of the table: the first i letters against every beginning of the second text
        above_J = distance_J
        distance_J = [i]
        for j, other in enumerate(second, start=1):
            replaced = above_J[j - 1] + (letter != other)
            distance_J.append(min(replaced, above_J[j] + 1, distance_J[j - 1] + 1))
    return distance_J[-1]
