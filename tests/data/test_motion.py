"""The embedded task of moving pictures: which captions there are, and what a clip of one shows."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.core.registry import UserError, build
from rlalign.data.motion import (
    CAPTION_MARKS,
    CAPTION_WORDS,
    FRAMES,
    KINDS,
    SPEEDS,
    SPLITS,
    Move,
    Pass,
    Thing,
    Turn,
    captions,
    change_motion,
    draw,
    kind_of,
    parse_caption,
    random_scene,
    split_of,
)
from rlalign.data.shapes import SIZE

RED = Thing(colour="red", shape="circle")
GREEN = Thing(colour="green", shape="cross")


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle moves right, fast", Move(thing=RED, direction="right", speed="fast")),
        ("a red circle moves up, then left", Turn(thing=RED, first="up", second="left")),
        (
            "a green cross stays while a red circle passes behind it",
            Pass(still=GREEN, mover=RED, side="behind"),
        ),
        (
            "a green cross stays while a red circle passes in front of it",
            Pass(still=GREEN, mover=RED, side="in front of"),
        ),
    ],
)
def test_a_caption_says_what_its_scene_is(caption, scene) -> None:
    assert parse_caption(caption) == scene
    assert scene.caption == caption


def test_every_caption_parses_to_itself_in_known_words_and_one_split() -> None:
    everything = {split: captions(split) for split in SPLITS}
    assert {split: len(texts) for split, texts in everything.items()} == {
        "train": 1172,
        "held_out": 172,
    }
    signs = {*CAPTION_WORDS, *CAPTION_MARKS}
    for split, texts in everything.items():
        for text in texts:
            scene = parse_caption(text)
            assert scene.caption == text and split_of(scene) == split
            assert set(text.replace(",", " ,").split()) <= signs


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red circle", "ends where one of moves, stays is expected"),
        ("a red circle moves rihgt, fast", "word 5 .*got 'rihgt'; did you mean 'right'"),
        ("a red circle moves up, then down", "one of left, right as word 8"),
        ("a red circle moves up, fast now", "must end after 'fast', got 'now'"),
        ("a red circle stays while a red cross passes behind it", "different colours, got 'red'"),
        ("a red circle stays while a blue cross passes in front", "ends where one of of"),
    ],
)
def test_a_caption_that_is_none_names_its_first_wrong_word(caption, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_caption(caption)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="split must be one of train, held_out, got 'novel'"):
        captions("novel")  # type: ignore[arg-type]


def _centre(frame_HWC: np.ndarray) -> np.ndarray:
    """(x, y) of what is bright."""
    bright_HW = frame_HWC.max(axis=-1) > 115
    return np.argwhere(bright_HW).mean(axis=0)[::-1]


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize(("direction", "axis", "sign"), [("left", 0, -1), ("down", 1, 1)])
def test_a_clip_moves_as_far_each_frame_as_its_caption_says(speed, direction, axis, sign) -> None:
    scene = Move(thing=RED, direction=direction, speed=speed)
    clip = draw(scene, np.random.default_rng(3))
    assert clip.shape == (FRAMES, SIZE, SIZE, 3) and clip.dtype == np.uint8
    way = _centre(clip[-1]) - _centre(clip[0])
    low, high = SPEEDS[speed]
    steps = FRAMES - 1
    # a centroid of whole pixels is half a pixel off at most
    assert low * steps - 0.5 < sign * way[axis] < high * steps + 0.5
    assert abs(way[1 - axis]) < 0.5


def test_a_clip_depends_on_the_generator_alone() -> None:
    scene = Turn(thing=RED, first="up", second="left")
    clips = [draw(scene, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_changed_motion_keeps_the_objects_and_is_never_the_same() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(100):
        scene = random_scene(rng)
        other = change_motion(scene, rng)
        assert kind_of(other) == kind_of(scene) and other != scene
        assert other.caption.split()[:3] == scene.caption.split()[:3]
        kinds.add(kind_of(scene))
    assert kinds == set(KINDS)


def test_the_prompts_are_of_the_asked_kinds_and_evaluation_sees_other_captions() -> None:
    source = build("prompts", {"name": "motion", "kinds": ["move", "turn"]})
    held_out = {text for _, text in source.held_out(500)}
    assert len(held_out) == 53 and len(source.pool()) == 331
    assert not held_out & set(source.pool())
    assert {kind_of(parse_caption(text)) for text in held_out} == {"move", "turn"}
    assert len(build("prompts", {"name": "motion", "limit": 7}).pool()) == 7
