"""The centroid reward on spots whose place is known."""

from __future__ import annotations

import pytest
import torch

from rlalign.rewards.centroid import FARTHEST, Centroid


def spot(row: int, column: int, size: int = 5) -> torch.Tensor:
    media = torch.zeros(1, 1, 3, size, size)
    media[:, :, :, row, column] = 1.0
    return media


@pytest.mark.parametrize(
    ("row", "column", "wanted"), [(0, 4, 0.0), (2, 2, -2.0), (4, 0, -8.0), (0, 0, -4.0)]
)
def test_the_distance_from_the_upper_right_corner(row: int, column: int, wanted: float) -> None:
    scorer = Centroid(x=1.0, y=1.0).load("cpu")
    assert scorer(spot(row, column), ["a"]).tolist() == pytest.approx([wanted], abs=1e-5)


def test_two_spots_meet_in_the_middle_and_frames_are_averaged() -> None:
    scorer = Centroid().load("cpu")
    assert scorer(spot(0, 0) + spot(4, 4), ["a"]).item() == pytest.approx(0.0, abs=1e-5)
    video = torch.cat([spot(2, 2), spot(2, 4)], dim=1)
    assert scorer(video, ["a"]).item() == pytest.approx(-0.5, abs=1e-5)


def test_a_black_picture_is_as_far_as_can_be() -> None:
    assert Centroid().load("cpu")(torch.zeros(1, 1, 3, 5, 5), ["a"]).item() == FARTHEST


def test_gradients_pull_the_spot() -> None:
    """d score / d picture points from dark pixels near the place to a larger score, as finite
    differences say."""
    media = (0.2 + 0.1 * torch.rand(1, 1, 3, 4, 4, dtype=torch.float32)).requires_grad_()
    scorer = Centroid(x=0.5, y=-0.5).load("cpu")
    (gradient,) = torch.autograd.grad(scorer(media, ["a"]).sum(), media)
    moved = media.detach().clone()
    moved[0, 0, 0, 3, 3] += 1e-2
    wanted = (scorer(moved, ["a"]) - scorer(media.detach(), ["a"])).item() / 1e-2
    assert gradient[0, 0, 0, 3, 3].item() == pytest.approx(wanted, rel=0.05)
