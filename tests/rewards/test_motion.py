"""The verifier of moving shapes on drawn clips, on clips spoilt on purpose, and on others'
captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.data.motion import Pass, Scene, draw, parse_caption, random_scene
from rlalign.rewards.base import score
from rlalign.rewards.motion import Motion, components, share

SCENES = [
    parse_caption(caption)
    for caption in (
        "a red circle moves right, fast",
        "a yellow triangle moves up, slowly",
        "a blue square moves up, then left",
        "a purple cross moves right, then down",
        "a green cross stays while a red circle passes behind it",
        "a blue square stays while a yellow triangle passes in front of it",
    )
]
CLIPS = [draw(scene, np.random.default_rng(n)) for n, scene in enumerate(SCENES)]


def drawn(count: int, seed: int) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, "held_out" if n % 2 else "train") for n in range(count)]
    return [(scene, draw(scene, rng)) for scene in scenes]


def test_a_drawn_clip_bears_out_its_caption_and_hardly_another() -> None:
    pairs = drawn(24, seed=0)
    own = [components(scene, clip) for scene, clip in pairs]
    assert np.mean([share(found) for found in own]) > 0.99
    assert min(value for found in own for value in found.values()) > 0.9
    # with the caption of another clip: little more than what shared colours give
    others = [share(components(pairs[n - 7][0], clip)) for n, (_, clip) in enumerate(pairs)]
    assert np.mean(others) < 0.25


def ground(clip: np.ndarray) -> np.ndarray:
    """The colour that is nowhere an object."""
    return np.median(clip.reshape(-1, 3), axis=0).astype(np.uint8)


def reversed_(clip: np.ndarray) -> np.ndarray:
    return clip[::-1]


def frozen(clip: np.ndarray) -> np.ndarray:
    return np.repeat(clip[:1], len(clip), axis=0)


def teleporting(clip: np.ndarray) -> np.ndarray:
    """Where it begins, and then at once where it ends."""
    return np.concatenate([np.repeat(clip[:1], 4, axis=0), np.repeat(clip[-1:], 5, axis=0)])


def flickering(clip: np.ndarray) -> np.ndarray:
    spoilt = clip.copy()
    spoilt[1::2] = ground(clip)
    return spoilt


def changing_colour(clip: np.ndarray) -> np.ndarray:
    """White in every other frame."""
    spoilt = clip.copy()
    odd = spoilt[1::2]
    odd[odd.max(axis=-1) > 115] = 240
    return spoilt


def cut(clip: np.ndarray) -> np.ndarray:
    """Another scene from the middle on."""
    other = draw(parse_caption("a white circle moves down, slowly"), np.random.default_rng(9))
    return np.concatenate([clip[:5], other[5:]])


def vanishing(clip: np.ndarray) -> np.ndarray:
    spoilt = clip.copy()
    spoilt[-3:] = ground(clip)
    return spoilt


@pytest.mark.parametrize(
    ("spoil", "component"),
    [
        (reversed_, "direction"),
        (frozen, "speed"),
        (frozen, "direction"),
        (teleporting, "continuity"),
        (flickering, "persistence"),
        (changing_colour, "persistence"),
        (cut, "persistence"),
        (cut, "end"),
        (vanishing, "end"),
    ],
)
def test_a_spoilt_clip_loses_in_the_component_that_names_it(spoil, component) -> None:
    for scene, clip in zip(SCENES, CLIPS, strict=True):
        # what passes from right to left has passed, too
        if spoil is reversed_ and isinstance(scene, Pass):
            continue
        found = components(scene, spoil(clip))
        assert found[component] < 0.6, (scene.caption, found)
        assert share(found) < share(components(scene, clip)) - 0.05


@pytest.mark.parametrize(
    ("caption", "claimed", "component"),
    [
        ("a red circle moves right, fast", "a red circle moves right, slowly", "speed"),
        ("a red circle moves right, slowly", "a red circle moves right, fast", "speed"),
        ("a red circle moves right, fast", "a red circle moves up, fast", "direction"),
        ("a red circle moves up, then left", "a red circle moves left, then up", "order"),
        (
            "a green cross stays while a red circle passes behind it",
            "a green cross stays while a red circle passes in front of it",
            "side",
        ),
        (
            "a green cross stays while a red circle passes behind it",
            "a red circle stays while a green cross passes in front of it",
            "stays",
        ),
        ("a red circle moves up, then left", "a red square moves up, then left", "object"),
    ],
)
def test_a_wrong_claim_fails_in_its_component_alone(caption, claimed, component) -> None:
    clip = draw(parse_caption(caption), np.random.default_rng(4))
    assert components(parse_caption(claimed), clip)[component] < 0.3
    assert components(parse_caption(caption), clip)[component] > 0.95


def test_a_clip_alone_scores_as_among_others() -> None:
    reward = Motion()
    scorer = reward.load("cpu")
    media = np.stack([clip.transpose(0, 3, 1, 2) for clip in CLIPS[:4]])
    captions = [scene.caption for scene in SCENES[1:5]]
    together = score(reward, scorer, media, captions)
    alone = [score(reward, scorer, media[i : i + 1], captions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == [float(one) for one in alone]


def test_the_reward_scores_uint8_clips_of_any_size_and_refuses_what_is_no_caption() -> None:
    reward = Motion()
    scorer = reward.load("cpu")
    media = np.stack([clip.transpose(0, 3, 1, 2) for clip in CLIPS])
    prompts = [scene.caption for scene in SCENES]
    assert score(reward, scorer, media, prompts).min() > 0.98
    twice = media.repeat(2, axis=3).repeat(2, axis=4)
    assert score(reward, scorer, twice, prompts).min() > 0.98
    assert score(reward, scorer, np.zeros_like(media), prompts).max() == 0.0
    with pytest.raises(UserError, match="'a cat' is not a caption of moving shapes"):
        score(reward, scorer, media[:1], ["a cat"])
    with pytest.raises(UserError, match="needs clips of 2 frames or more, got 1"):
        scorer(torch.zeros(1, 1, 3, 32, 32), prompts[:1])
