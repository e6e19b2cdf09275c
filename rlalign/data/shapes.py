"""The embedded task: 32x32 pictures of coloured shapes on a dark ground, with captions that say
exactly what is there.

A scene is one or two groups of equal objects. A group is a number (1 to 3), a colour and a shape;
two groups have different colours, at most four objects together, and a relation, "left of" or
"above". What a caption claims is a short list of facts that ``rlalign/rewards/shapes.py`` reads off
the pixels again. NumPy alone; nothing here needs torch.

The captions fall into three splits. "novel" captions contain one of four colour-shape pairs that no
training picture shows; of the others, those whose hash is 0 modulo 8 are "held_out", and the rest
is "train".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal, get_args

import numpy as np

from rlalign.core.registry import UserError, nearest
from rlalign.data.splits import is_held_out, known_split

SIZE = 32
"""Pixels on a side."""

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.13, 0.13),
    "green": (0.12, 0.80, 0.20),
    "blue": (0.15, 0.35, 0.98),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.82, 0.20, 0.88),
    "white": (0.95, 0.95, 0.95),
}
"""Colour word -> RGB in [0, 1]."""

PLURALS: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
}
"""Shape word -> its plural."""

NUMBERS: tuple[str, ...] = ("a", "two", "three")
"""The words for 1, 2 and 3."""

Relation = Literal["left of", "above"]
Split = Literal["train", "held_out", "novel"]

RELATIONS: tuple[Relation, ...] = get_args(Relation)
SPLITS: tuple[Split, ...] = get_args(Split)

NOVEL_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("red", "cross"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle")}
)
"""Colour-shape pairs that no training picture shows; each colour and each shape is seen in other
pairs."""

CAPTION_WORDS: tuple[str, ...] = (
    *NUMBERS,
    *PALETTE,
    *chain.from_iterable(PLURALS.items()),
    *" ".join(RELATIONS).split(),
)
"""Every word a caption can contain, in a fixed order."""

_MOST_OBJECTS = 4
_LONE_GROUP_SHARE = 0.35
"""Share of one-group scenes in ``random_scene``; counted by caption they would be one in a
hundred."""

_MARGIN = 0.6  # pixels between an object and the picture's edge
# pixels between two objects, so that a blurred picture still shows two
_GAP = 2.0
# layouts proposed at once; the first that fits is taken
_PROPOSALS = 128
_OVERSAMPLE = 4  # sub-pixels on a side, for anti-aliased edges
_CROSS_ARM = 0.36  # half width of a cross's arm, in half sizes


@dataclass(frozen=True, kw_only=True)
class Group:
    """``number`` objects of one colour and one shape."""

    number: int
    colour: str
    shape: str

    @property
    def words(self) -> str:
        """ "a red circle", "two red circles"."""
        noun = self.shape if self.number == 1 else PLURALS[self.shape]
        return f"{NUMBERS[self.number - 1]} {self.colour} {noun}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows: one group, or two and the relation of the first to the second."""

    groups: tuple[Group, ...]
    relation: Relation | None = None

    @property
    def caption(self) -> str:
        """The scene in words: "two green crosses above a white triangle"."""
        return f" {self.relation} ".join(group.words for group in self.groups)

    @property
    def objects(self) -> int:
        """How many objects the picture shows."""
        return sum(group.number for group in self.groups)


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes.

    Raises UserError naming the first word that cannot stand where it stands.
    """
    words = text.split()

    # one group, or two with a relation between them
    first, at = _parse_group(text, words, 0)
    if at == len(words):
        return Scene(groups=(first,))
    relation: Relation | None = next(
        (r for r in RELATIONS if words[at : at + len(r.split())] == r.split()), None
    )
    if relation is None:
        raise _bad_word(text, words, at, "a relation", tuple(RELATIONS))
    second, at = _parse_group(text, words, at + len(relation.split()))
    if at != len(words):
        raise UserError(f"caption {text!r} must end after its second group, got {words[at]!r}")

    # which must be a scene that can be drawn
    scene = Scene(groups=(first, second), relation=relation)
    if first.colour == second.colour:
        raise UserError(
            f"caption {text!r} must give its two groups different colours, got {first.colour!r}"
            " twice"
        )
    if scene.objects > _MOST_OBJECTS:
        raise UserError(
            f"caption {text!r} must name at most {_MOST_OBJECTS} objects, got {scene.objects}"
        )
    return scene


def _parse_group(text: str, words: Sequence[str], at: int) -> tuple[Group, int]:
    number = _one_of(text, words, at, "a number", NUMBERS)
    colour = _one_of(text, words, at + 1, "a colour", tuple(PALETTE))
    nouns = tuple(PLURALS) if number == "a" else tuple(PLURALS.values())
    noun = _one_of(text, words, at + 2, "a shape" if number == "a" else "a plural shape", nouns)
    shape = tuple(PLURALS)[nouns.index(noun)]
    return Group(number=NUMBERS.index(number) + 1, colour=colour, shape=shape), at + 3


def _one_of(text: str, words: Sequence[str], at: int, what: str, known: tuple[str, ...]) -> str:
    if at >= len(words) or words[at] not in known:
        raise _bad_word(text, words, at, what, known)
    return words[at]


def _bad_word(
    text: str, words: Sequence[str], at: int, what: str, known: tuple[str, ...]
) -> UserError:
    if at >= len(words):
        return UserError(
            f"caption {text!r} ends where {what} is expected; known: {', '.join(known)}"
        )
    return UserError(
        f"caption {text!r} must have {what} as word {at + 1}, got {words[at]!r};"
        f" {nearest(words[at], [*known])}"
    )


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to; it depends on the caption alone."""
    if any((group.colour, group.shape) in NOVEL_PAIRS for group in scene.groups):
        return "novel"
    return "held_out" if is_held_out(scene.caption) else "train"


def captions(split: Split) -> tuple[str, ...]:
    """Every caption of a split, one-group captions first, in a fixed order."""
    return tuple(scene.caption for scene in chain(*_scenes(known_split(split, SPLITS))))


def random_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """A scene of a split: in about one case of three a single group, else two."""
    lone, paired = _scenes(known_split(split, SPLITS))
    kind = lone if rng.random() < _LONE_GROUP_SHARE else paired
    return kind[int(rng.integers(len(kind)))]


@functools.lru_cache(maxsize=len(SPLITS))
def _scenes(split: Split) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """One-group and two-group scenes of a split."""
    numbers = range(1, len(NUMBERS) + 1)
    kinds = product(PALETTE, PLURALS, numbers)
    groups = [Group(number=n, colour=c, shape=s) for c, s, n in kinds]
    lone = [Scene(groups=(group,)) for group in groups]
    paired = [
        Scene(groups=(first, second), relation=relation)
        for first, second, relation in product(groups, groups, RELATIONS)
        if first.colour != second.colour and first.number + second.number <= _MOST_OBJECTS
    ]
    of_lone = tuple(scene for scene in lone if split_of(scene) == split)
    return of_lone, tuple(scene for scene in paired if split_of(scene) == split)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of a scene: (32, 32, 3) uint8, objects of 7 to 9 pixels, jittered in place, size
    and brightness."""
    # the ground
    picture_HWC = np.full((SIZE, SIZE, 3), rng.uniform(0.03, 0.10)) + rng.normal(
        0.0, 0.006, (SIZE, SIZE, 1)
    )

    # the objects, each painted over its own box
    kinds = list(chain.from_iterable([group] * group.number for group in scene.groups))
    centres_N2, halves_N = _layout(scene, rng)
    brightness_N = rng.uniform(0.92, 1.04, len(kinds))
    for group, (x, y), half, brightness in zip(
        kinds, centres_N2, halves_N, brightness_N, strict=True
    ):
        colour_C = np.minimum(np.array(PALETTE[group.colour]) * brightness, 1.0)
        left = int(x - half)
        top = int(y - half)
        right = min(int(x + half) + 1, SIZE)
        bottom = min(int(y + half) + 1, SIZE)
        cover_HW1 = coverage(group.shape, x - left, y - top, half, bottom - top, right - left)[
            ..., None
        ]
        patch_HWC = picture_HWC[top:bottom, left:right]
        patch_HWC += cover_HW1 * (colour_C - patch_HWC)
    return np.round(picture_HWC.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def coverage(shape: str, x: float, y: float, half: float, height: int, width: int) -> np.ndarray:
    """(height, width) share of each pixel that an object centred at (x, y) covers, 0 to 1; all
    lengths in pixels."""
    v_H1 = ((np.arange(height * _OVERSAMPLE) + 0.5)[:, None] / _OVERSAMPLE - y) / half
    u_1W = ((np.arange(width * _OVERSAMPLE) + 0.5)[None, :] / _OVERSAMPLE - x) / half
    fine = np.broadcast_to(_inside(shape, u_1W, v_H1), (height * _OVERSAMPLE, width * _OVERSAMPLE))
    return fine.reshape(height, _OVERSAMPLE, width, _OVERSAMPLE).mean(axis=(1, 3))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of the box [-1, 1]^2 (v points down) belong to a shape."""
    if shape == "circle":
        return u**2 + v**2 <= 1.0
    wide = np.abs(u) <= 1.0
    tall = np.abs(v) <= 1.0
    if shape == "square":
        return wide & tall
    if shape == "triangle":
        return tall & (np.abs(u) <= (v + 1.0) / 2.0)
    assert shape == "cross", shape
    return (tall & (np.abs(u) <= _CROSS_ARM)) | (wide & (np.abs(v) <= _CROSS_ARM))


def _layout(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (N, 2) as (x, y) and half sizes (N,) that keep the gaps and make the relation clearly
    true."""
    # how large the objects are, and how far apart
    count = scene.objects
    halves_N = rng.uniform(3.7, 4.7, count) if count < 3 else rng.uniform(3.5, 4.1, count)
    apart_NN = halves_N[:, None] + halves_N[None, :] + _GAP
    np.fill_diagonal(apart_NN, -1.0)

    # where their centres may lie
    low_N = _MARGIN + halves_N
    high_N = SIZE - _MARGIN - halves_N
    axis = RELATIONS.index(scene.relation) if scene.relation else None
    first = scene.groups[0].number

    # many layouts are drawn at once, and the first that fits is taken
    while True:
        centres_KN2 = rng.uniform(low_N[:, None], high_N[:, None], (_PROPOSALS, count, 2))
        gap_KNN = np.abs(centres_KN2[:, :, None] - centres_KN2[:, None, :]).max(axis=-1)
        fits_K = (gap_KNN >= apart_NN).all(axis=(1, 2))
        if axis is not None:
            ends_K = (centres_KN2[:, :first, axis] + halves_N[:first]).max(axis=1)
            starts_K = (centres_KN2[:, first:, axis] - halves_N[first:]).min(axis=1)
            fits_K &= ends_K <= starts_K
        if fits_K.any():
            return centres_KN2[int(fits_K.argmax())], halves_N
