"""The verifier against pictures whose truth is known, because they were drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.data.shapes import SPLITS, draw, parse_caption, random_scene
from rlalign.rewards.shapes import DetectedObject, Shapes, detect, facts, share

COUNT = 501


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, list[str]]:
    """Pictures (COUNT, 1, 3, 32, 32) of all splits in turn, and their captions."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, SPLITS[n % 3]) for n in range(COUNT)]
    pictures = np.stack([draw(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, None] / 255.0, [
        scene.caption for scene in scenes
    ]


def scores(media: torch.Tensor, prompts: list[str]) -> np.ndarray:
    return Shapes().load("cpu")(media, prompts).numpy()


def test_own_caption_scores_one(drawn):
    score_B = scores(*drawn)
    assert score_B.dtype == np.float32 and score_B.shape == (COUNT,)
    assert score_B.mean() > 0.99


def test_another_pictures_caption_scores_near_chance(drawn):
    """Captions moved on by 100 pictures. Chance is 0.18: mostly wrong colours, on which number and
    shape hang as well."""
    media, prompts = drawn
    assert scores(media, prompts[100:] + prompts[:100]).mean() < 0.25


def test_a_blank_picture_bears_out_nothing(drawn):
    _, prompts = drawn
    for level in (0.0, 0.06, 1.0):
        blank = torch.full((COUNT, 1, 3, 32, 32), level)
        assert scores(blank, prompts).mean() <= (
            0.25 if level == 1.0 else 0.0
        )  # all white is a white thing


@pytest.mark.parametrize(("blur", "noise"), [(0.4, 0.0), (0.6, 0.0), (0.0, 0.06), (0.4, 0.04)])
def test_robust_to_what_an_autoencoder_does(drawn, blur, noise):
    """Gaussian blur in pixels and Gaussian noise in [0, 1]; own captions still score above 0.99
    (seed 1)."""
    from scipy import ndimage

    media, prompts = drawn
    blurred = ndimage.gaussian_filter(media.numpy(), (0, 0, 0, blur, blur))
    noisy = blurred + np.random.default_rng(1).normal(0.0, 1.0, blurred.shape) * noise
    assert scores(torch.from_numpy(noisy.clip(0.0, 1.0)).float(), prompts).mean() > 0.99


def picture(caption: str, seed: int = 0) -> np.ndarray:
    return draw(parse_caption(caption), np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("shown", "said", "wrong"),
    [
        ("a red circle", "a blue circle", {"group 1 colour", "group 1 number", "group 1 shape"}),
        ("a red circle", "two red circles", {"group 1 number", "nothing else"}),
        ("a red circle", "a red triangle", {"group 1 shape"}),
        ("a red circle left of a blue square", "a blue square left of a red circle", {"relation"}),
        ("a red circle above a blue square", "a blue square above a red circle", {"relation"}),
        ("a red circle above a blue square", "a red circle", {"nothing else"}),
        (
            "a red circle",
            "a red circle above a blue square",
            {"group 2 colour", "group 2 number", "group 2 shape", "relation", "nothing else"},
        ),
        (
            "two green crosses above a white triangle",
            "two green crosses above a white triangle",
            set(),
        ),
    ],
)
def test_each_wrong_fact_is_found_and_no_other(shown, said, wrong):
    for seed in range(5):
        found = facts(parse_caption(said), detect(picture(shown, seed)))
        assert {name for name, holds in found.items() if not holds} == wrong


def test_facts_are_counted_evenly():
    assert share({"a": True, "b": False, "c": True, "d": True}) == 0.75
    one = [DetectedObject(colour="red", shape="circle", x=5.0, y=5.0, area=50)]
    assert len(facts(parse_caption("a red circle"), one)) == 4
    assert len(facts(parse_caption("a red circle above a blue cross"), one)) == 8
    mixed = [*one, DetectedObject(colour="red", shape="square", x=20.0, y=20.0, area=50)]
    assert not facts(parse_caption("two red circles"), mixed)["group 1 shape"]


def test_detect_finds_place_and_area():
    picture_HWC = np.full((32, 32, 3), 15, dtype=np.uint8)
    picture_HWC[4:12, 20:28] = (235, 33, 33)
    (found,) = detect(picture_HWC)
    assert found == DetectedObject(colour="red", shape="square", x=24.0, y=8.0, area=64)


def test_specks_are_nothing_and_shapeless_blobs_have_no_shape():
    picture_HWC = np.full((32, 32, 3), 15, dtype=np.uint8)
    picture_HWC[3:6, 3:6] = 240
    assert detect(picture_HWC) == []
    picture_HWC[10:12, 2:30] = 240
    assert [found.shape for found in detect(picture_HWC)] == ["unclear"]


def test_a_clip_scores_the_mean_of_its_frames():
    right, wrong = picture("a red circle"), picture("a blue circle")
    clip = torch.from_numpy(np.stack([right, wrong])).permute(0, 3, 1, 2)[None] / 255.0
    alone = scores(clip.transpose(0, 1), ["a red circle"] * 2)
    assert scores(clip, ["a red circle"])[0] == pytest.approx(alone.mean())
    assert alone.tolist() == [1.0, 0.25]


def test_a_prompt_that_is_no_caption_is_named():
    with pytest.raises(UserError, match="prompt 'a photo of a dog' is not a caption of shapes"):
        scores(torch.zeros(1, 1, 3, 32, 32), ["a photo of a dog"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_pixels_that_are_not_finite_have_no_score(value):
    media = torch.zeros(2, 1, 3, 32, 32)
    media[1, 0, 2, 3, 4] = float(value)
    with pytest.raises(UserError, match="the policy's decoder gives values that are not finite"):
        scores(media, ["a red circle", "a blue square"])
