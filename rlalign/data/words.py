"""The embedded task of written text: 32x32 pictures of one short word in light capitals on a dark
ground, with captions such as ``the word "CAT"``.

A word is a consonant, a vowel and a consonant, or these and a vowel more: 3,370 words, few of which
are in a dictionary. Every letter stands in a cell of its own (a monospaced font), so a model that
knows each letter at each place can write words that it never saw. Words whose hash is 0 modulo 8
are "held_out", the rest is "train"; each letter of a held-out word occurs in training at its place.
There are no O and no Q, which readers take for 0, and no word that one would rather not read.

Pillow draws, with DejaVu Sans Mono Bold, which comes with matplotlib.
"""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlalign.data.splits import is_held_out, known_split

SIZE = 32
"""Pixels on a side."""

CONSONANTS = "BCDFHLMNPRSTV"
VOWELS = "AEIU"
PATTERNS: tuple[tuple[str, ...], ...] = (
    (CONSONANTS, VOWELS, CONSONANTS),
    (CONSONANTS, VOWELS, CONSONANTS, VOWELS),
)
"""Which letters stand at which place, for each length of a word."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

CAPTION_WORDS: tuple[str, ...] = ("the", "word")
"""The words of every caption, beside the quoted one."""
CAPTION_MARKS = '"'
"""The marks of every caption."""

_LEFT_OUT = frozenset({"CUM", "FUC", "RAPE", "TIT"})
_FONT = "DejaVuSansMono-Bold.ttf"
_FONT_SIZE = 12  # pixels; capitals are 9 pixels high and a cell is 7.2 wide
_LEFT = 2  # pixels before the first letter; four letters leave as much behind the last
_DRIFT = 2  # largest whole pixels up or down from the middle


def caption(word: str) -> str:
    """The word's caption: ``the word "CAT"``."""
    return f'{" ".join(CAPTION_WORDS)} "{word}"'


def split_of(word: str) -> Split:
    """The split a word belongs to; it depends on the word alone."""
    return "held_out" if is_held_out(word) else "train"


def words(split: Split) -> tuple[str, ...]:
    """Every word of a split, those of three letters first, in a fixed order."""
    return tuple(word for kind in _words(known_split(split, SPLITS)) for word in kind)


def random_word(rng: np.random.Generator, split: Split = "train") -> str:
    """A word of a split, of three or four letters with equal odds."""
    kinds = _words(known_split(split, SPLITS))
    kind = kinds[int(rng.integers(len(kinds)))]
    return kind[int(rng.integers(len(kind)))]


def misspell(word: str, rng: np.random.Generator) -> str:
    """The word with one or two of its letters replaced by others of the same kind (consonant or
    vowel)."""
    letters = list(word)
    for place in rng.permutation(len(letters))[: 1 + int(rng.integers(2))]:
        kind = VOWELS if letters[place] in VOWELS else CONSONANTS
        others = [letter for letter in kind if letter != letters[place]]
        letters[place] = others[int(rng.integers(len(others)))]
    return "".join(letters)


def draw(word: str, rng: np.random.Generator) -> np.ndarray:
    """A picture of a word: (32, 32, 3) uint8, capitals 9 pixels high from the left, jittered in
    height, tint and brightness."""
    from PIL import Image, ImageDraw

    # how much of each pixel the letters cover
    middle = SIZE // 2 + int(rng.integers(-_DRIFT, _DRIFT + 1))
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).text((_LEFT, middle), word, fill=255, font=_font(), anchor="lm")
    cover_HW1 = np.asarray(mask, dtype=np.float64)[..., None] / 255.0

    # a light tint over a dark ground with a little grain
    ground_HWC = np.full((SIZE, SIZE, 3), rng.uniform(0.03, 0.10)) + rng.normal(
        0.0, 0.006, (SIZE, SIZE, 1)
    )
    colour_C = rng.uniform(0.7, 1.0, 3)
    picture_HWC = ground_HWC + cover_HW1 * (colour_C - ground_HWC)
    return np.round(picture_HWC.clip(0.0, 1.0) * 255.0).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _font() -> Any:
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / _FONT
    # the basic layout is Pillow's own; the other depends on a library that may be there or not
    return ImageFont.truetype(str(file), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=len(SPLITS))
def _words(split: Split) -> tuple[tuple[str, ...], ...]:
    """Words of a split by length."""
    kinds = (map("".join, product(*pattern)) for pattern in PATTERNS)

    def is_kept(word: str) -> bool:
        return word not in _LEFT_OUT and split_of(word) == split

    return tuple(tuple(filter(is_kept, kind)) for kind in kinds)
