"""The drawn task: captions, splits and pictures."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.core.registry import UserError
from rlalign.data.shapes import (
    CAPTION_WORDS,
    NOVEL_PAIRS,
    PALETTE,
    PLURALS,
    SPLITS,
    Group,
    Scene,
    captions,
    coverage,
    draw,
    parse_caption,
    random_scene,
    split_of,
)


def test_caption_says_the_scene():
    one, two = (
        Group(number=1, colour="white", shape="triangle"),
        Group(number=2, colour="green", shape="cross"),
    )
    assert (
        Scene(groups=(two, one), relation="above").caption
        == "two green crosses above a white triangle"
    )
    assert (
        Scene(groups=(Group(number=3, colour="red", shape="circle"),)).caption
        == "three red circles"
    )


def test_every_caption_parses_to_itself_and_uses_known_words():
    for split in SPLITS:
        for caption in captions(split):
            assert parse_caption(caption).caption == caption
            assert set(caption.split()) <= set(CAPTION_WORDS)


def test_splits_are_disjoint_complete_and_stable():
    """6 colours x 4 shapes: 72 lone groups; 24 * 20 ordered pairs of colours * 6 pairs of numbers *
    2 relations."""
    parts = {split: captions(split) for split in SPLITS}
    everything = [caption for part in parts.values() for caption in part]
    assert len(everything) == len(set(everything)) == 72 + 24 * 20 * 6 * 2
    # 20 of 24 pairs are seen: 20 * 3 lone; 20 ordered seen pairs less those of one colour, 20 * 20
    # - (4 * 3^2 + 2 * 4^2)
    assert len(parts["train"]) + len(parts["held_out"]) == 60 + (20 * 20 - 68) * 6 * 2
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 3509,
        "held_out": 535,
        "novel": 1788,
    }
    assert parts["train"][0] == "a red circle"
    assert all(captions(split) == parts[split] for split in SPLITS)


def test_novel_pairs_leave_each_colour_and_shape_to_training():
    seen = {
        (g.colour, g.shape) for caption in captions("train") for g in parse_caption(caption).groups
    }
    assert seen == {(c, s) for c in PALETTE for s in PLURALS} - NOVEL_PAIRS
    assert all(
        any((g.colour, g.shape) in NOVEL_PAIRS for g in parse_caption(c).groups)
        for c in captions("novel")
    )


@pytest.mark.parametrize("split", SPLITS)
def test_random_scenes_stay_in_their_split(split):
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng, split) for _ in range(300)]
    assert {split_of(scene) for scene in scenes} == {split}
    assert (
        0.25 < np.mean([len(scene.groups) == 1 for scene in scenes]) < 0.45
    )  # 0.35, three standard errors are 0.083


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red sircle", "'sircle'; did you mean 'circle'"),
        ("one red circle", "must have a number as word 1, got 'one'"),
        ("a pink circle", "must have a colour as word 2, got 'pink'"),
        ("two red circle", "must have a plural shape as word 3, got 'circle'"),
        ("a red circles", "must have a shape as word 3, got 'circles'"),
        ("a red circle below a blue square", "must have a relation as word 4, got 'below'"),
        ("a red circle left a blue square", "got 'left'"),
        ("a red circle above", "ends where a number is expected"),
        ("", "ends where a number is expected"),
        ("a red circle above a blue square today", "must end after its second group, got 'today'"),
        ("a red circle above a red square", "different colours, got 'red' twice"),
        ("three red circles above two blue squares", "at most 4 objects, got 5"),
    ],
)
def test_a_wrong_caption_is_a_users_mistake(text, says):
    with pytest.raises(UserError, match=says):
        parse_caption(text)


def test_an_unknown_split_is_a_users_mistake():
    with pytest.raises(UserError, match="'heldout'; did you mean 'held_out'"):
        captions("heldout")  # pyright: ignore[reportArgumentType]


def test_a_picture_depends_on_its_generator_alone():
    scene = parse_caption("three white crosses left of a purple triangle")
    first, again = draw(scene, np.random.default_rng(3)), draw(scene, np.random.default_rng(3))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, draw(scene, np.random.default_rng(4)))


def test_ground_is_dark_and_the_object_has_its_colour():
    picture = draw(parse_caption("a blue circle"), np.random.default_rng(0)) / 255.0
    lit = picture.max(axis=-1) > 0.5
    assert picture[~lit].mean() < 0.12
    assert np.abs(picture[lit].mean(axis=0) - PALETTE["blue"]).max() < 0.1


@pytest.mark.parametrize(
    ("shape", "share"),
    [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5), ("cross", 1 - 0.64**2)],
)
def test_coverage_is_the_shapes_area(shape, share):
    """A shape of half size 10 covers its share of a 20 x 20 box, wherever it lies on the grid of
    pixels (1 % of the box)."""
    for shift in (0.0, 0.3, 0.71):
        area = coverage(shape, 15.0 + shift, 15.0 - shift, 10.0, 30, 30).sum()
        assert abs(area / 400.0 - share) < 0.02
