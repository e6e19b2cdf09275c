"""The JPEG reward: kilobytes of what Pillow writes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rlalign.core.registry import UserError, build
from rlalign.rewards.base import score
from rlalign.rewards.jpeg import Jpeg, kilobytes


def pictures():
    """(2, 1, 3, 32, 32) uint8: one colour, and noise."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    return np.stack([np.full((1, 3, 32, 32), 90, dtype=np.uint8), noise])


def bytes_of(picture_CHW, quality=95):
    buffer = io.BytesIO()
    Image.fromarray(picture_CHW.transpose(1, 2, 0)).save(buffer, "JPEG", quality=quality)
    return len(buffer.getvalue())


def test_the_score_is_bytes_over_1000_of_pillows_jpeg():
    media = pictures()
    expected = np.array([bytes_of(p[0]) for p in media]) / 1000
    for direction, sign in (("compressible", -1), ("incompressible", 1)):
        reward = Jpeg(direction=direction)
        found = score(reward, reward.load("cpu"), media, ["a", "b"])
        np.testing.assert_allclose(found, sign * expected, rtol=1e-6)


def test_uint8_pixels_come_back_unchanged():
    """255 * (u / 255) in float32 rounds to u for all 256 values, so the JPEG is that of the picture
    itself."""
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 16, 16).repeat(3, axis=2)
    media = torch.from_numpy(ramp).float() / 255
    assert kilobytes(media, 95).item() == pytest.approx(bytes_of(ramp[0, 0]) / 1000, rel=1e-6)


def test_pixels_are_rounded_not_cut():
    media = torch.from_numpy(pictures()).float() / 255
    nearly = media + 0.4 / 255 * torch.rand_like(media).sub(0.5).sign()
    assert torch.equal(kilobytes(nearly, 95), kilobytes(media, 95))


def test_values_out_of_range_are_clamped():
    media = torch.tensor([-3.0, 4.0]).reshape(2, 1, 1, 1, 1).expand(2, 1, 3, 8, 8)
    assert torch.equal(kilobytes(media, 95), kilobytes(media.clamp(0, 1), 95))


def test_one_colour_is_smaller_than_noise():
    flat, noise = kilobytes(torch.from_numpy(pictures()).float() / 255, 95).tolist()
    assert 0.3 < flat < 0.9, "mostly Pillow's header, in units of 1000 bytes"
    assert noise > 2 * flat


def test_better_quality_is_larger():
    media = torch.from_numpy(pictures()[1:]).float() / 255
    sizes = [kilobytes(media, quality).item() for quality in (5, 20, 50, 80, 95, 100)]
    assert sizes == sorted(set(sizes))


def test_the_same_picture_twice_is_the_same_size():
    media = torch.from_numpy(pictures()).float() / 255
    assert torch.equal(kilobytes(media, 95), kilobytes(media.clone(), 95))


def test_frames_are_averaged():
    video = torch.from_numpy(pictures()).float().transpose(0, 1) / 255
    assert video.shape == (1, 2, 3, 32, 32)
    alone = kilobytes(video.transpose(0, 1), 95)
    assert kilobytes(video, 95).item() == pytest.approx(alone.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("setting", "value", "rule"), [("quality", 0, ">= 1"), ("quality", 101, "<= 100")]
)
def test_the_quality_is_pillows(setting, value, rule):
    with pytest.raises(UserError, match=rf"^rewards\[0\]\.{setting} must be {rule}, got {value}$"):
        build("rewards", {"name": "jpeg", setting: value}, "rewards[0]")


def test_the_direction_is_one_of_two():
    with pytest.raises(
        UserError,
        match=r"rewards\.direction must be 'compressible' or 'incompressible', got 'small'",
    ):
        build("rewards", {"name": "jpeg", "direction": "small"})
