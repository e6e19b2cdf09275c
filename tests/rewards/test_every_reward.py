"""What holds for every reward of the shelf: a picture alone scores as among others, pictures of
other sizes and blank ones have a score within the range, and grey is a colour.

``OWN`` names the rewards whose own tests say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.prompts import Prompt
from rlalign.core.registry import build, names
from rlalign.networks.towers import build_towers
from rlalign.rewards.base import Reward, Scorer, score
from tests.rewards.small_models import save_clip, save_head, save_imagereward, save_pickscore

OWN = {
    "clear": ("test_plans.py", "test_a_plan_alone_scores_as_among_others"),
    "detour": ("test_plans.py", "test_a_plan_alone_scores_as_among_others"),
    "dynamic_degree": ("test_clips.py", "test_a_clip_alone_scores_as_among_others"),
    "geneval": ("test_geneval.py", "test_one_picture_alone_scores_as_among_others"),
    "hazard": ("test_plans.py", "test_a_plan_alone_scores_as_among_others"),
    "hpsv3": ("test_hpsv3.py", "test_alone_among_others_and_as_a_clip"),
    "http": ("test_http.py", "test_scores_are_bitwise_those_of_the_reward_itself"),
    "length": ("test_plans.py", "test_a_plan_alone_scores_as_among_others"),
    "motion": ("test_motion.py", "test_a_clip_alone_scores_as_among_others"),
    "ocr": ("test_ocr.py", "test_a_score_does_not_depend_on_its_batch"),
    "quadratic": (
        "test_quadratic.py",
        "test_it_is_the_sum_over_channels_and_places_and_a_sample_alone_scores_as_among_others",
    ),
    "reach": ("test_plans.py", "test_a_plan_alone_scores_as_among_others"),
    "safety": ("test_safety.py", "test_one_picture_alone_scores_as_among_others"),
    "smoothness": ("test_clips.py", "test_a_clip_alone_scores_as_among_others"),
    "tesseract": ("test_tesseract.py", "test_a_score_does_not_depend_on_its_batch"),
    "videoalign": ("test_videoalign.py", "test_alone_among_others_and_in_which_order"),
    "vlm_judge": ("test_vlm_judge.py", "test_many_pictures_are_each_given_their_own_score"),
}
RANGES: dict[str, tuple[float, float]] = {
    "aesthetic": (-math.inf, math.inf),
    "bradley_terry": (-100.0, 100.0),
    "centroid": (-8.0, 0.0),
    "clip": (-2.5, 2.5),
    "function": (0.0, 1.0),
    "hpsv2": (-2.5, 2.5),
    "imagereward": (-math.inf, math.inf),
    "jpeg": (-math.inf, 0.0),
    "pickscore": (-100.0, 100.0),
    "shapes": (0.0, 1.0),
}
"""Reward -> its least and its greatest score, with the settings below; a cosine times its scale."""
PROMPTS = [
    Prompt("a red circle", {"text": "CIRCLE"}),
    Prompt("a blue square", {"text": "SQUARE"}),
    Prompt("a white cross", {"text": "A"}),
    Prompt("a green triangle", {"text": "OF FOUR WORDS AND MORE"}),
]
SIZES = [(32, 32), (40, 56), (96, 41), (3, 2)]


def mean_of(media_BFCHW: torch.Tensor, prompts: object) -> torch.Tensor:
    return media_BFCHW.mean((1, 2, 3, 4))


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """Settings under which a reward loads from small models of its own kind."""
    tiny = {"architecture": "tiny"}

    def head() -> dict[str, Any]:
        width = build_towers("tiny").images(torch.zeros(1, 1, 3, 32, 32)).shape[-1]
        made = save_head(folder, (width, 16, 8, 6, 4, 1))
        return {**tiny, "weights": str(save_clip(folder)), "head": str(made)}

    made: dict[str, Callable[[], dict[str, Any]]] = {
        "aesthetic": head,
        "clip": lambda: {**tiny, "weights": str(save_clip(folder)), "scale": 2.5},
        "hpsv2": lambda: {**tiny, "weights": str(save_clip(folder)), "scale": 2.5},
        "pickscore": lambda: save_pickscore(folder)[2],
        "imagereward": lambda: save_imagereward(folder)[2],
        "function": lambda: {"call": "tests.rewards.test_every_reward:mean_of"},
    }
    return {"name": name, **made.get(name, dict)()}


@pytest.fixture(scope="module", params=sorted(RANGES))
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reward, Scorer]:
    """A reward and its live scorer."""
    reward = build("rewards", settings_of(request.param, tmp_path_factory.mktemp(request.param)))
    assert isinstance(reward, Reward)
    return reward, reward.load("cpu")


def pictures(height: int, width: int) -> np.ndarray:
    """(4, 1, 3, H, W) uint8: noise, grey noise, black, white."""
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (2, 1, 3, height, width), dtype=np.uint8)
    noise[1] = noise[1, :, :1]
    blank = np.zeros_like(noise)
    blank[1] = 255
    return np.concatenate([noise, blank])


def test_every_reward_is_tested() -> None:
    assert set(names("rewards")) == RANGES.keys() | OWN.keys()
    for file, test in OWN.values():
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_size_and_blank_ones_score_within_the_range(
    loaded: tuple[Reward, Scorer], size: tuple[int, int]
) -> None:
    """And each alone as among the others, to a rounding error of the network's sums."""
    reward, scorer = loaded
    media = pictures(*size)
    together = score(reward, scorer, media, PROMPTS)
    alone = [score(reward, scorer, media[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=2e-5)
    lowest, highest = RANGES[reward.title]
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    assert (together >= lowest).all() and (together <= highest).all()
    turned = score(reward, scorer, media[::-1].copy(), PROMPTS[::-1])
    np.testing.assert_allclose(turned[::-1], together, rtol=1e-4, atol=2e-5)
