"""Coloured shapes followed through the frames of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlalign.data.motion import Thing
from rlalign.rewards.shapes import DetectedObject

CONTACT = 0.28
"""Distance of two centres, as a share of the clip's side, below which one may hide part of the
other: 9 pixels of 32."""

_UNHIDDEN = 0.8
"""The quantile over frames of an object's area that is taken for the area of all of it."""

_WHOLE = 0.85
"""Share of that area from which on all of an object is seen."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """One object of a caption, by its colour, through F frames.

    All lengths are in pixels of a clip of 32 on a side, whatever the clip's own size.
    """

    seen_F: np.ndarray
    """Whether something of its colour is there."""
    centre_F2: np.ndarray
    """Its centroid (x, y); in frames that do not show it, on the line between those that do."""
    area_F: np.ndarray
    """How much of it is seen; 0 where nothing is."""
    shaped_F: np.ndarray
    """Whether it has the caption's shape."""
    pieces_F: np.ndarray
    """In how many pieces it is seen."""

    @property
    def whole_area(self) -> float:
        """Its area where nothing hides it, at least 1: a high quantile of what is seen."""
        return max(float(np.quantile(self.area_F, _UNHIDDEN)), 1.0)

    @property
    def step_F2(self) -> np.ndarray:
        """(F - 1, 2) way from each frame to the next."""
        return np.diff(self.centre_F2, axis=0)

    def behind(self, contact_F: np.ndarray) -> Track:
        """The track of an object that is partly hidden where ``contact_F`` says so and less than
        all of it is seen: there its centre is on the line between the frames that show all."""
        known_F = self.seen_F & ~(contact_F & (self.area_F < _WHOLE * self.whole_area))
        return replace(self, centre_F2=_filled(self.centre_F2, known_F))


def follow(thing: Thing, found: Sequence[Sequence[DetectedObject]], scale: float) -> Track:
    """The object of a caption in what each frame shows; ``scale`` turns the clip's pixels into
    those of a clip of 32 on a side.

    Pieces of one colour are one object, at their common centroid, since what passes in front of it
    may cut it.
    """
    own = [[d for d in frame if d.colour == thing.colour] for frame in found]
    area_F = np.array([sum(d.area for d in frame) for frame in own], dtype=float)
    centre_F2 = np.zeros((len(own), 2))
    for frame, pieces in enumerate(own):
        if pieces:
            places = [(d.x, d.y) for d in pieces]
            centre_F2[frame] = np.average(places, axis=0, weights=[d.area for d in pieces])
    return Track(
        seen_F=area_F > 0,
        centre_F2=_filled(centre_F2, area_F > 0) * scale,
        area_F=area_F * scale**2,
        shaped_F=np.array([any(d.shape == thing.shape for d in frame) for frame in own]),
        pieces_F=np.array([len(frame) for frame in own]),
    )


def _filled(centre_F2: np.ndarray, known_F: np.ndarray) -> np.ndarray:
    """Centres with those that are not known on the lines between the known ones."""
    if not known_F.any():
        return centre_F2
    numbers = np.arange(len(known_F))
    columns = [np.interp(numbers, numbers[known_F], c[known_F]) for c in centre_F2.T]
    return np.stack(columns, axis=1)
