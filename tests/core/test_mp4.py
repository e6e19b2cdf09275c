"""Clips as MP4: what another reader finds in them, and that nobody reads them as data."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from rlalign.core.clips import Clip, encode_clip, read_clip
from rlalign.core.media import UnreadablePicture, read_picture
from rlalign.core.mp4 import encode_mp4, refuse_missing_encoder, write_mp4s
from rlalign.core.registry import UserError
from rlalign.data.motion import draw, parse_caption
from rlalign.data.pairs.rows import decode
from rlalign.voting.sources.files import as_shown, find_pictures
from tests.made_clips import made_clips


def frames_of(content: bytes) -> tuple[np.ndarray, float]:
    """((F, 3, H, W) uint8, frames a second) as PyAV reads a file."""
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.pix_fmt == "yuv420p"
        return np.stack(found).transpose(0, 3, 1, 2), float(stream.average_rate or 0)


@pytest.mark.parametrize("rate", [8.0, 16.0, 23.976])
def test_a_player_finds_all_frames_at_their_rate(rate: float) -> None:
    """Near the drawn ones, and no more than near."""
    scene = parse_caption("a red circle moves right, fast")
    media = draw(scene, np.random.default_rng(0)).transpose(0, 3, 1, 2)
    found, said = frames_of(encode_mp4(Clip(media_FCHW=media, rate=rate)))
    assert found.shape == media.shape
    assert said == pytest.approx(rate, abs=1e-3)
    off = np.abs(found.astype(int) - media.astype(int))
    assert 0 < off.mean() < 3


def test_odd_sides_are_made_even_and_a_frozen_clip_keeps_its_frames() -> None:
    media = np.full((5, 3, 7, 9), 90, np.uint8)
    found, _ = frames_of(encode_mp4(Clip(media_FCHW=media)))
    assert found.shape == (5, 3, 8, 10)
    assert np.abs(found.astype(int) - 90).max() <= 3


def test_each_clip_of_a_folder_has_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "ball").mkdir()
    for number, clip in enumerate(made_clips(2)):
        (tmp_path / "ball" / f"{number:05d}.webp").write_bytes(encode_clip(clip)[0])
    written = write_mp4s(tmp_path / "ball")
    assert [file.name for file in written] == ["00000.mp4", "00001.mp4"]
    # the folder is what it was for whoever reads it
    found = find_pictures(str(tmp_path))["ball"]
    assert [read_clip(one.read()).shape for one in found] == [made_clips(2)[0].shape] * 2
    # and an MP4 alone is none of it
    (tmp_path / "ball" / "00001.webp").unlink()
    with pytest.raises(UserError, match=r"00001\.mp4 is a lossy video and is not read: its frames"):
        find_pictures(str(tmp_path))


def test_it_is_no_data() -> None:
    """Nor is WebM; AVIF in the same container is a picture, which a reader may know."""
    content = encode_mp4(Clip(media_FCHW=made_clips(1)[0]))
    with pytest.raises(UnreadablePicture, match=r"MP4 is a lossy video, .* lossless animated WebP"):
        read_clip(content)
    with pytest.raises(ValueError, match=r"cannot be decoded \(MP4 is a lossy video"):
        decode(content, 32)
    with pytest.raises(UserError, match=r"x\.mp4 must be a picture.* is a lossy MP4: votes on it"):
        as_shown(content, "x.mp4", caption="c")
    with pytest.raises(UnreadablePicture, match="WebM is a lossy video"):
        read_picture(b"\x1aE\xdf\xa3 and so on")
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(b"\0\0\0\x1cftypavif and so on")
    assert "lossy" not in str(caught.value)


def test_without_the_package_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"--mp4 needs the package av; pip install 'rlalign\[video"):
        refuse_missing_encoder("--mp4")
