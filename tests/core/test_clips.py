"""Clips come back from their files frame by frame: frozen ones, partly frozen ones, single ones;
and those that other programs wrote."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from rlalign.core import clips
from rlalign.core.clips import decode_clip, encode_animation, encode_clip, read_clip, spread
from rlalign.core.media import UnreadablePicture, read_picture


def moving(frames: int, height: int = 5, width: int = 7, seed: int = 0) -> np.ndarray:
    """(F, 3, H, W) random uint8 frames."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, 3, height, width), dtype=np.uint8)


def frozen(media: np.ndarray, *spans: tuple[int, int]) -> np.ndarray:
    """The same, still from the first to the second number of each span."""
    media = media.copy()
    for first, last in spans:
        media[first : last + 1] = media[first]
    return media


CLIPS = {
    "moving": moving(9),
    "frozen": frozen(moving(9), (0, 8)),
    "frozen at first": frozen(moving(9), (0, 3)),
    "frozen in the middle": frozen(moving(9), (3, 6)),
    "frozen at last": frozen(moving(9), (5, 8)),
    "of two": moving(2),
    "of two equal ones": frozen(moving(2), (0, 1)),
    "back and forth": moving(2)[[0, 1, 0, 1, 1, 0]],
    "a picture": moving(1),
    "one pixel": moving(4, 1, 1),
    "odd sizes": moving(3, 33, 65),
    "black": np.zeros((5, 3, 4, 4), np.uint8),
}


@pytest.mark.parametrize("rate", [8.0, 16.0, 24.0, 23.976, 60.0])
@pytest.mark.parametrize("name", CLIPS)
def test_the_very_frames_come_back(name: str, rate: float) -> None:
    media = CLIPS[name]
    content, kind = encode_clip(media, rate)
    assert kind == ("image/png" if len(media) == 1 else "image/webp")
    found = decode_clip(content)
    assert found.media_FCHW.dtype == np.uint8
    assert np.array_equal(found.media_FCHW, media)
    assert found.rate == (rate if len(media) > 1 else clips.RATE)
    # as a viewer without rlalign shows it
    assert np.array_equal(np.asarray(read_picture(content)), media[0].transpose(1, 2, 0))


@pytest.mark.parametrize("name", CLIPS)
def test_animated_png_is_as_exact(name: str) -> None:
    assert np.array_equal(read_clip(encode_animation(CLIPS[name], "png", 12.5)), CLIPS[name])


def test_a_clip_of_flat_colours_survives_gif() -> None:
    media = np.zeros((6, 3, 8, 8), np.uint8)
    media[:, 0] = 255
    for number in range(6):
        media[number, 1, number] = 255
    found = decode_clip(encode_animation(media, "gif", 10.0))
    assert np.array_equal(found.media_FCHW, media)
    assert found.rate == 10.0


def test_a_picture_of_one_frame_is_the_png_that_it_was() -> None:
    """Bit for bit what an encoder of pictures gives: sets and stores name pictures by their
    bytes."""
    buffer = io.BytesIO()
    Image.fromarray(CLIPS["a picture"][0].transpose(1, 2, 0)).save(buffer, format="PNG")
    assert encode_clip(CLIPS["a picture"])[0] == buffer.getvalue()


def saved(media: np.ndarray, format: str, durations: list[int], **settings: object) -> bytes:
    """An animation as another program writes it, without a word about frames."""
    first, *others = [Image.fromarray(one.transpose(1, 2, 0)) for one in media]
    buffer = io.BytesIO()
    how = {"lossless": True} if format == "WEBP" else {}
    first.save(
        buffer,
        format=format,
        save_all=True,
        append_images=others,
        duration=durations,
        **how,
        **settings,
    )
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
def test_files_of_others_are_read_by_their_durations(format: str) -> None:
    media = moving(4)
    found = decode_clip(saved(media, format, [50, 100, 50, 200]))
    assert np.array_equal(found.media_FCHW, np.repeat(media, [1, 2, 1, 4], axis=0))
    assert found.rate == 20.0
    # thirty a second in whole milliseconds
    assert np.array_equal(read_clip(saved(media, format, [33, 33, 34, 33])), media)
    # an encoder has merged what was equal
    merged = saved(frozen(media, (1, 2)), format, [40] * 4)
    assert np.array_equal(read_clip(merged), frozen(media, (1, 2)))


def test_gif_without_durations_has_the_frames_that_it_has() -> None:
    media = np.stack([np.full((3, 4, 4), shade, np.uint8) for shade in (0, 90, 180)])
    found = decode_clip(saved(media, "GIF", [0, 0, 0]))
    assert np.array_equal(found.media_FCHW, media)
    assert found.rate == clips.RATE


def test_a_png_whose_first_picture_is_for_other_readers_is_played_without_it() -> None:
    media = moving(3)
    content = saved(media, "PNG", [50, 50], default_image=True)
    assert np.array_equal(read_clip(content), media[1:])


def test_transparent_frames_show_white() -> None:
    frames = [Image.new("RGBA", (4, 4), (value, 0, 0, 128)) for value in (0, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    media = read_clip(buffer.getvalue())
    assert media[:, :, 0, 0].tolist() == [[127, 127, 127], [227, 127, 127]]


def test_pages_are_no_clip() -> None:
    pages = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    assert read_clip(buffer.getvalue())[:, 0, 0, 0].tolist() == [10]


def test_what_a_file_says_of_itself_must_fit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations count where the words were written for other pictures."""
    media = moving(3)
    content = encode_animation(media, "webp", 10.0, lossless=True)
    for false in (b'{"held": [1, 1], ', b'{"held": [1,-1,1]', b'{"held": {"a": 1}'):
        said = re.search(rb'\{"held": \[1, 1, 1\]', content)
        assert said is not None
        other = content.replace(said.group(), false.ljust(len(said.group())))
        assert np.array_equal(read_clip(other), media)
    # more frames than memory holds
    monkeypatch.setattr(clips, "MAX_PIXELS", 5 * 7 * 3 - 1)
    with pytest.raises(UnreadablePicture, match="3 frames of 7 x 5 have more than 104 pixels"):
        read_clip(content)
    still = encode_animation(frozen(media, (0, 2)), "webp", lossless=True)
    with pytest.raises(UnreadablePicture, match="3 frames of 7 x 5"):
        read_clip(still)


@pytest.mark.parametrize("cut", [0, 20, 100, 300])
def test_a_damaged_clip_is_refused_or_read_to_the_end(cut: int) -> None:
    content, _ = encode_clip(moving(6))
    with pytest.raises(UnreadablePicture):
        read_clip(content[:cut])


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert spread(4, 6) == [0, 1, 2, 3]
    assert spread(9, 6) == [0, 2, 3, 5, 6, 8]
    assert spread(81, 6) == [0, 16, 32, 48, 64, 80]
    assert spread(1, 6) == [0]
