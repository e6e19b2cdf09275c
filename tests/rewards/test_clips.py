"""Rewards of any clip, smoothness and dynamic degree, against closed forms; and what guards
against what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlalign.core.registry import UserError, build
from rlalign.rewards.base import score
from rlalign.rewards.dynamic_degree import DynamicDegree
from rlalign.rewards.smoothness import Smoothness


def clip(*levels: float) -> torch.Tensor:
    """One clip of 4x5 frames, each of one grey."""
    return torch.tensor(levels).reshape(1, -1, 1, 1, 1).expand(1, len(levels), 3, 4, 5).clone()


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ((0.5, 0.5, 0.5), 1.0),
        ((0.0, 0.25, 0.5, 0.75), 1.0),
        ((0.0, 1.0, 0.0), 0.0),
        ((0.0, 0.0, 1.0, 1.0), 0.5),
    ],
)
def test_smoothness_is_how_near_each_frame_is_to_the_middle_of_its_neighbours(
    levels: tuple[float, ...], wanted: float
) -> None:
    assert Smoothness().load("cpu")(clip(*levels), ["a"]).item() == pytest.approx(wanted)


def test_dynamic_degree_is_the_mean_change_of_what_changes_most() -> None:
    media = torch.zeros(1, 3, 3, 4, 5)
    media[0, 1, :, 0, 0] = 1.0  # one pixel of twenty appears and goes
    assert DynamicDegree().load("cpu")(media, ["a"]).item() == pytest.approx(1.0)
    assert DynamicDegree(share=0.1).load("cpu")(media, ["a"]).item() == pytest.approx(0.5)
    assert DynamicDegree(share=1.0).load("cpu")(media, ["a"]).item() == pytest.approx(0.05)
    # of one channel alone, a third
    media[0, 1, 1:] = 0.0
    assert DynamicDegree().load("cpu")(media, ["a"]).item() == pytest.approx(1 / 3)


def test_a_frozen_clip_is_smooth_and_not_dynamic() -> None:
    media = torch.rand(2, 1, 3, 6, 6).expand(2, 4, 3, 6, 6)
    assert Smoothness().load("cpu")(media, ["a", "b"]).tolist() == [1.0, 1.0]
    assert DynamicDegree().load("cpu")(media, ["a", "b"]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("reward", [Smoothness(), DynamicDegree()])
@pytest.mark.parametrize("size", [(32, 32), (7, 41)])
def test_a_clip_alone_scores_as_among_others(
    reward: Smoothness | DynamicDegree, size: tuple[int, int]
) -> None:
    """Of any size, and blank; within 0 to 1."""
    media = np.random.default_rng(3).integers(0, 256, (4, 5, 3, *size), dtype=np.uint8)
    media[1] = 0
    scorer = reward.load("cpu")
    together = score(reward, scorer, media, ["a"] * 4)
    alone = [score(reward, scorer, media[i : i + 1], ["a"])[0] for i in range(4)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert ((together >= 0.0) & (together <= 1.0)).all()


@pytest.mark.parametrize("reward", [Smoothness(), DynamicDegree(share=0.5)])
def test_gradients_are_what_finite_differences_say(reward: Smoothness | DynamicDegree) -> None:
    media = torch.rand(1, 4, 3, 3, 4, generator=torch.Generator().manual_seed(1))
    scorer = reward.load("cpu")
    media.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(media, ["a"]).sum(), media)
    moved = media.detach().clone()
    moved[0, 1, 2, 1, 1] += 1e-3
    wanted = (scorer(moved, ["a"]) - scorer(media.detach(), ["a"])).item() / 1e-3
    assert gradient[0, 1, 2, 1, 1].item() == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize(("name", "least"), [("smoothness", 3), ("dynamic_degree", 2)])
def test_too_few_frames_and_single_frames_are_refused(name: str, least: int) -> None:
    with pytest.raises(UserError, match=f"rewards.{name} needs clips of {least} frames or more"):
        build("rewards", {"name": name}).load("cpu")(torch.zeros(1, 1, 3, 4, 4), ["a"])
    with pytest.raises((UserError, ValidationError), match=f"frames has no meaning for {name}"):
        build("rewards", {"name": name, "frames": "mean"})
