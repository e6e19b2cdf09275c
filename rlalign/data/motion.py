"""The embedded task of moving pictures: clips of 9 frames of 32x32 in which coloured shapes move on
a dark ground, with captions that say exactly what happens.

There are three kinds of scenes. One object moves along a line, "a red circle moves right, fast".
One object turns once, "a blue square moves up, then left". One object stays while another crosses
it, "a green cross stays while a red circle passes behind it". What a caption claims is what
``rlalign/rewards/motion.py`` follows in the pixels again. NumPy alone; nothing here needs torch.

Captions whose hash is 0 modulo 8 are "held_out", the rest is "train".
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal, get_args

import numpy as np

from rlalign.core.registry import UserError, nearest
from rlalign.data.shapes import PALETTE, PLURALS, SIZE, coverage

FRAMES = 9
"""Frames of a clip, 4 n + 1 as causal video autoencoders take them."""

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
"""Direction word -> unit vector (x, y); y points down."""

SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.8, 1.0), "fast": (2.0, 2.4)}
"""Speed word -> range in pixels per frame."""

TURN_SPEED = (1.7, 2.2)
"""Range of the speed of an object that turns, pixels per frame."""

Side = Literal["behind", "in front of"]
Split = Literal["train", "held_out"]
Kind = Literal["move", "turn", "pass"]

SIDES: tuple[Side, ...] = get_args(Side)
SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)

CAPTION_WORDS: tuple[str, ...] = (
    *("a", "moves", "then", "stays", "while", "passes", "it"),
    *PALETTE,
    *PLURALS,
    *DIRECTIONS,
    *SPEEDS,
    *" ".join(SIDES).split(),
)
"""Every word a caption can contain, in a fixed order."""
CAPTION_MARKS = ","
"""The marks that captions contain."""

_SHARES: dict[Kind, float] = {"move": 0.4, "turn": 0.35, "pass": 0.25}
"""Share of each kind in ``random_scene``; counted by caption, seven in ten would be of "pass"."""
_HELD_OUT_ONE_IN = 8
_MARGIN = 0.6  # pixels between an object and the clip's edge
_OFF_CENTRE = 1.5  # largest distance from the middle where two objects meet, pixels on each axis


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: its colour and its shape."""

    colour: str
    shape: str

    @property
    def words(self) -> str:
        """ "a red circle"."""
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Move:
    """An object moves along a line at one of two speeds."""

    thing: Thing
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        """ "a red circle moves right, fast"."""
        return f"{self.thing.words} moves {self.direction}, {self.speed}"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An object moves along one axis in the first half of the clip, along the other in the
    second."""

    thing: Thing
    first: str
    second: str

    @property
    def caption(self) -> str:
        """ "a blue square moves up, then left"."""
        return f"{self.thing.words} moves {self.first}, then {self.second}"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """An object stays in the middle while another, of another colour, crosses it from edge to
    edge, from any side."""

    still: Thing
    mover: Thing
    side: Side

    @property
    def caption(self) -> str:
        """ "a green cross stays while a red circle passes behind it"."""
        return f"{self.still.words} stays while {self.mover.words} passes {self.side} it"


Scene = Move | Turn | Pass
"""What a clip shows."""


def kind_of(scene: Scene) -> Kind:
    """Which of the three kinds a scene is."""
    if isinstance(scene, Move):
        return "move"
    return "turn" if isinstance(scene, Turn) else "pass"


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes.

    Raises UserError naming the first word that cannot stand where it stands.
    """
    words = text.replace(",", " ,").split()
    first = _parse_thing(text, words, 0)
    verb = _one_of(text, words, 3, ("moves", "stays"))
    if verb == "stays":
        return _parse_pass(text, words, first)

    # a direction, and then a speed or another direction
    direction = _one_of(text, words, 4, tuple(DIRECTIONS))
    _one_of(text, words, 5, (",",))
    word = _one_of(text, words, 6, (*SPEEDS, "then"))
    if word in SPEEDS:
        _end(text, words, 7)
        return Move(thing=first, direction=direction, speed=word)
    second = _one_of(text, words, 7, _across(direction))
    _end(text, words, 8)
    return Turn(thing=first, first=direction, second=second)


def _parse_pass(text: str, words: Sequence[str], still: Thing) -> Pass:
    _one_of(text, words, 4, ("while",))
    mover = _parse_thing(text, words, 5)
    _one_of(text, words, 8, ("passes",))
    if _one_of(text, words, 9, ("behind", "in")) == "behind":
        side, at = SIDES[0], 10
    else:
        _one_of(text, words, 10, ("front",))
        _one_of(text, words, 11, ("of",))
        side, at = SIDES[1], 12
    _one_of(text, words, at, ("it",))
    _end(text, words, at + 1)
    if still.colour == mover.colour:
        raise UserError(
            f"caption {text!r} must give its two objects different colours, got {still.colour!r}"
            " twice"
        )
    return Pass(still=still, mover=mover, side=side)


def _parse_thing(text: str, words: Sequence[str], at: int) -> Thing:
    _one_of(text, words, at, ("a",))
    colour = _one_of(text, words, at + 1, tuple(PALETTE))
    return Thing(colour=colour, shape=_one_of(text, words, at + 2, tuple(PLURALS)))


def _one_of(text: str, words: Sequence[str], at: int, known: tuple[str, ...]) -> str:
    if at >= len(words):
        raise UserError(f"caption {text!r} ends where one of {', '.join(known)} is expected")
    if words[at] not in known:
        raise UserError(
            f"caption {text!r} must have one of {', '.join(known)} as word {at + 1} (a comma is a"
            f" word), got {words[at]!r}; {nearest(words[at], [*known])}"
        )
    return words[at]


def _end(text: str, words: Sequence[str], at: int) -> None:
    if len(words) > at:
        raise UserError(f"caption {text!r} must end after {words[at - 1]!r}, got {words[at]!r}")


def _across(direction: str) -> tuple[str, ...]:
    """The two directions of the other axis."""
    names = tuple(DIRECTIONS)
    return names[2:] if direction in names[:2] else names[:2]


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to; it depends on the caption alone."""
    digest = hashlib.blake2b(scene.caption.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0 else "train"


def captions(split: Split, kinds: Sequence[Kind] = KINDS) -> tuple[str, ...]:
    """Every caption of a split, kind after kind, in a fixed order."""
    found = _scenes(_known_split(split))
    return tuple(scene.caption for kind in kinds for scene in found[kind])


def random_scene(rng: np.random.Generator, split: Split = "train") -> Scene:
    """A scene of a split: a move in two cases of five, a turn in one of three, else a pass."""
    found = _scenes(_known_split(split))
    kind = found[KINDS[int(rng.choice(len(KINDS), p=[_SHARES[kind] for kind in KINDS]))]]
    return kind[int(rng.integers(len(kind)))]


def change_motion(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same objects in a scene of the same kind that moves otherwise: another direction, speed,
    order or side."""
    if isinstance(scene, Pass):
        return Pass(still=scene.still, mover=scene.mover, side=SIDES[1 - SIDES.index(scene.side)])
    others: list[Scene]
    if isinstance(scene, Move):
        others = [
            Move(thing=scene.thing, direction=direction, speed=speed)
            for direction, speed in product(DIRECTIONS, SPEEDS)
        ]
    else:
        others = [Turn(thing=scene.thing, first=a, second=b) for a, b in _turns()]
    others.remove(scene)
    return others[int(rng.integers(len(others)))]


def _turns() -> list[tuple[str, str]]:
    return [(a, b) for a in DIRECTIONS for b in _across(a)]


def _known_split(split: str) -> Split:
    for known in SPLITS:
        if split == known:
            return known
    raise UserError(
        f"split must be one of {', '.join(SPLITS)}, got {split!r}; {nearest(split, [*SPLITS])}"
    )


@functools.lru_cache(maxsize=len(SPLITS))
def _scenes(split: Split) -> dict[Kind, tuple[Scene, ...]]:
    """The scenes of a split by kind."""
    things = [Thing(colour=colour, shape=shape) for colour, shape in product(PALETTE, PLURALS)]
    moves = product(things, DIRECTIONS, SPEEDS)
    turns = product(things, _turns())
    passes = product(permutations(things, 2), SIDES)
    everything: dict[Kind, list[Scene]] = {
        "move": [Move(thing=t, direction=d, speed=s) for t, d, s in moves],
        "turn": [Turn(thing=t, first=a, second=b) for t, (a, b) in turns],
        "pass": [
            Pass(still=still, mover=mover, side=side)
            for (still, mover), side in passes
            if still.colour != mover.colour
        ],
    }
    return {
        kind: tuple(scene for scene in scenes if split_of(scene) == split)
        for kind, scenes in everything.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Track:
    """An object on its way: its centre (F, 2) as (x, y) and half its size, in pixels."""

    thing: Thing
    centre_F2: np.ndarray
    half: float


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A clip of a scene: (9, 32, 32, 3) uint8, objects of 7 to 9 pixels, jittered in place, size,
    speed and brightness."""
    # a still ground with a little grain
    ground_HWC = np.full((SIZE, SIZE, 3), rng.uniform(0.03, 0.10)) + rng.normal(
        0.0, 0.006, (SIZE, SIZE, 1)
    )
    clip_FHWC = np.repeat(ground_HWC[None], FRAMES, axis=0)

    # the objects, what lies behind first
    for track in _tracks(scene, rng):
        colour_C = np.array(PALETTE[track.thing.colour]) * rng.uniform(0.92, 1.04)
        colour_C = np.minimum(colour_C, 1.0)
        for frame_HWC, (x, y) in zip(clip_FHWC, track.centre_F2, strict=True):
            _paint(frame_HWC, track, x, y, colour_C)
    return np.round(clip_FHWC.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _paint(frame_HWC: np.ndarray, track: _Track, x: float, y: float, colour_C: np.ndarray) -> None:
    """Paints an object centred at (x, y) over its own box of a frame."""
    half = track.half
    left = int(x - half)
    top = int(y - half)
    right = min(int(x + half) + 1, SIZE)
    bottom = min(int(y + half) + 1, SIZE)
    cover_HW = coverage(track.thing.shape, x - left, y - top, half, bottom - top, right - left)
    patch_HWC = frame_HWC[top:bottom, left:right]
    patch_HWC += cover_HW[..., None] * (colour_C - patch_HWC)


def _tracks(scene: Scene, rng: np.random.Generator) -> list[_Track]:
    """The objects of a scene from back to front."""
    if isinstance(scene, Pass):
        return _crossing(scene, rng)
    half = float(rng.uniform(3.7, 4.7))
    step_F2 = _steps(scene, rng)
    offset_F2 = np.cumsum(step_F2, axis=0)

    # the whole way lies within the clip
    low_2 = _MARGIN + half - offset_F2.min(axis=0)
    high_2 = SIZE - _MARGIN - half - offset_F2.max(axis=0)
    start_2 = rng.uniform(low_2, high_2)
    return [_Track(thing=scene.thing, centre_F2=start_2 + offset_F2, half=half)]


def _steps(scene: Move | Turn, rng: np.random.Generator) -> np.ndarray:
    """(F, 2) way from each frame's predecessor to it, pixels; (0, 0) for the first."""
    step_F2 = np.zeros((FRAMES, 2))
    if isinstance(scene, Move):
        step_F2[1:] = rng.uniform(*SPEEDS[scene.speed]) * np.array(DIRECTIONS[scene.direction])
        return step_F2
    middle = FRAMES // 2 + 1
    speed = rng.uniform(*TURN_SPEED)
    step_F2[1:middle] = speed * np.array(DIRECTIONS[scene.first])
    step_F2[middle:] = speed * np.array(DIRECTIONS[scene.second])
    return step_F2


def _crossing(scene: Pass, rng: np.random.Generator) -> list[_Track]:
    """The two objects of a pass; the mover comes from any side."""
    half_still, half = rng.uniform(3.7, 4.7, 2)
    still_2 = SIZE / 2 + rng.uniform(-_OFF_CENTRE, _OFF_CENTRE, 2)

    # from one edge to the other on one axis, near the middle on the other axis
    axis = int(rng.integers(2))
    ends = np.array([_MARGIN + half, SIZE - _MARGIN - half])
    if rng.random() < 0.5:
        ends = ends[::-1]
    centre_F2 = np.empty((FRAMES, 2))
    centre_F2[:, axis] = np.linspace(ends[0], ends[1], FRAMES)
    centre_F2[:, 1 - axis] = SIZE / 2 + rng.uniform(-_OFF_CENTRE, _OFF_CENTRE)

    # which of them is painted first
    mover = _Track(thing=scene.mover, centre_F2=centre_F2, half=float(half))
    still = _Track(
        thing=scene.still,
        centre_F2=np.repeat(still_2[None], FRAMES, axis=0),
        half=float(half_still),
    )
    return [mover, still] if scene.side == "behind" else [still, mover]
