"""The reader of pictures: each mode has the right values, whatever is broken is refused, and 8-bit
RGB and grey are Pillow's."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlalign.core.clips import read_clip
from rlalign.core.media import UnreadablePicture, _to_rgb, read_picture
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import decode
from rlalign.samplers.edict import read_pictures
from tests import made_pictures
from tests.made_pictures import KINDS, exif, png, saved, turned

MANY = 500
COUNTS = [len(KINDS), pytest.param(MANY, marks=pytest.mark.slow)]
"""Each kind once by default."""


def pixels(source: bytes | Path) -> np.ndarray:
    return np.asarray(read_picture(source))


def refused(source: bytes | Path) -> str:
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(source)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def whole_or_none(blob: bytes) -> np.ndarray | None:
    """What is read; None where it is refused."""
    try:
        found = pixels(blob)
    except UnreadablePicture:
        found = None
    # the reader of clips begins with the same picture, and refuses what it refuses
    try:
        first = read_clip(blob)[0].transpose(1, 2, 0)
    except UnreadablePicture:
        return found
    assert found is not None and np.array_equal(first, found)
    return found


def unit(count: int) -> Unit:
    ids = tuple(range(count))
    return Unit(
        key=UnitKey("x", 0, 0),
        prompts=("a",) * count,
        prompt_ids=ids,
        sample_ids=ids,
        seed=0,
        plan=Plan(),
    )


# pictures made from seeds 0, 1, 2 and so on


@pytest.mark.parametrize("count", COUNTS)
def test_pictures_of_every_kind_show_what_was_written(tmp_path: Path, count: int) -> None:
    """By bytes, as a preference set has them, and by path, as an edit's source is named."""
    file = tmp_path / "picture"
    for seed in range(count):
        made = made_pictures.make(seed)
        file.write_bytes(made.blob)
        if made.shown is None:
            assert "whose range is not known" in refused(made.blob), made.what
            with pytest.raises(
                UserError, match="sampler.source: cannot read .*picture' as a picture"
            ):
                read_pictures((file,), unit(1))
            continue
        shown = made.shown.transpose(2, 0, 1).astype(int)
        frames = decode(made.blob)
        assert len(frames) == 1 or "save_all" in made.what, made.what
        found = frames[0]
        assert found.shape == shown.shape, made.what
        assert np.abs(found - shown).max() <= made.off, made.what
        assert np.array_equal(
            read_pictures((file,), unit(1))[0].numpy(), found.astype(np.float32) / 255.0
        ), made.what


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of tags that it skips
@pytest.mark.parametrize("count", COUNTS)
def test_a_truncated_or_damaged_file_is_refused_or_whole(count: int) -> None:
    """Cut anywhere it is refused, unless only what follows the picture is lost; bytes that changed
    raise nothing else."""
    for seed in range(count):
        made = made_pictures.make(seed)
        if made.shown is None:
            continue
        whole = pixels(made.blob)
        rng = np.random.default_rng([1, seed])
        for cut in [*rng.integers(0, len(made.blob), 4).tolist(), len(made.blob) - 1]:
            found = whole_or_none(made.blob[:cut])
            assert found is None or np.array_equal(found, whole), (
                f"{made.what}, cut at {cut} of {len(made.blob)}"
            )
        for _ in range(3):
            damaged = np.frombuffer(made.blob, dtype=np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
            found = whole_or_none(damaged.tobytes())
            assert found is None or found.shape[2] == 3, made.what


# bit for bit


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_8_bit_rgb_and_grey_are_as_pillow_converts_them(mode: str, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (17, 23, len(mode)), dtype=np.uint8)
    blob = saved(Image.frombytes(mode, (23, 17), values.tobytes()), kind)
    plain = Image.open(io.BytesIO(blob)).convert("RGB")
    assert np.array_equal(pixels(blob), np.asarray(plain))
    resized = np.asarray(plain.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(decode(blob, 8)[0], resized)


# modes that no seed makes


def test_lab_has_the_colours_of_its_definition() -> None:
    """CIE L*a*b* under D50 (ISO 15076-1), as Pillow reads TIFF: pure red, mid grey and white."""
    bytes_of = lambda light, a, b: bytes([round(light * 2.55), a % 256, b % 256])  # noqa: E731
    picture = Image.frombytes(
        "LAB", (3, 1), bytes_of(54.3, 81, 70) + bytes_of(53.4, 0, 0) + bytes_of(100, 0, 0)
    )
    found = pixels(saved(picture, "TIFF"))[0].astype(int)
    assert np.abs(found - [[255, 0, 0], [127, 127, 127], [255, 255, 255]]).max() <= 6


@pytest.mark.parametrize(
    ("mode", "stored", "shown"),
    [
        ("HSV", (0, 255, 200), (200, 0, 0)),
        ("La", (40, 100), (195, 195, 195)),
        ("RGBa", (40, 0, 100, 100), (195, 155, 255)),
        ("PA", (0, 0), (255, 255, 255)),
        ("RGBX", (1, 2, 3, 99), (1, 2, 3)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("I;16", 257 * 80, (80, 80, 80)),
        ("I;16B", 257 * 80, (80, 80, 80)),
        ("I;16L", 257 * 80, (80, 80, 80)),
        ("I;16N", 257 * 80, (80, 80, 80)),
    ],
)
def test_modes_that_a_format_may_open_as(
    mode: str, stored: int | tuple[int, ...], shown: tuple[int, ...]
) -> None:
    picture = Image.new(mode, (2, 2), stored)
    assert np.asarray(_to_rgb(picture, "")).tolist() == [[list(shown)] * 2] * 2


def test_12_bits_of_grey_are_scaled_by_4095() -> None:
    """Two values of 12 bits in three bytes, little end of the file first; one row."""
    values = struct.pack("<I", 0xFFF800)[:3][::-1]  # 4095 and 2048, packed as TIFF packs them
    tags = [
        (256, 2),
        (257, 1),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 3),
    ]
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags
    )
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    blob = b"II*\0" + struct.pack("<I", 8 + len(values) + 1) + values + b"\0" + directory
    assert pixels(blob)[0, :, 0].tolist() == [255, 128]


# orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("how", ["exif", "xmp"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_held_as_its_orientation_says(kind: str, how: str, orientation: int) -> None:
    values = np.zeros((24, 32, 3), dtype=np.uint8)
    values[:8, :8] = 250  # the corner of the first row and the first column
    said = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description'
        f' tiff:Orientation="{orientation}"/></x:xmpmeta>'
    )
    more: dict[str, object] = (
        {"exif": exif(orientation)} if how == "exif" else {"xmp": said.encode()}
    )
    if how == "xmp" and kind == "TIFF":
        more = {"tiffinfo": {700: said.encode()}}
    if how == "xmp" and kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        words = PngInfo()
        words.add_itxt("XML:com.adobe.xmp", said)
        more = {"pnginfo": words}
    found = pixels(saved(Image.fromarray(values), kind, **more))
    assert np.abs(found.astype(int) - turned(values, orientation)).max() < 40


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "said", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(0), exif(9), b""]
)
def test_exif_that_says_nothing_leaves_the_picture_as_it_lies(said: bytes) -> None:
    values = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    blob = saved(Image.fromarray(values), "PNG", exif=said or None)
    assert np.array_equal(pixels(blob), values)


# animations, and files of several pages


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"):
        how = (
            {"lossless": True}
            if kind == "WEBP"
            else {"quality": 95}
            if kind in ("MPO", "AVIF")
            else {}
        )
        found = pixels(saved(first, kind, save_all=True, append_images=[second], **how)).astype(int)
        assert np.abs(found - [200, 0, 0]).max() <= 4, kind
    still = pixels(saved(first, "PNG", save_all=True, append_images=[second], default_image=True))
    assert (still == [200, 0, 0]).all(), "APNG's picture for those who know no animation"


# what is refused


def test_what_is_no_picture_is_refused_in_a_few_words(tmp_path: Path) -> None:
    assert refused(b"no picture") == "no picture that Pillow knows"
    assert refused(b"") == "the file is empty"
    assert refused(tmp_path / "missing.png") == "there is no such file"
    assert refused(tmp_path / "nul\0.png") == "there is no such file"
    assert refused(tmp_path) == "it is no file"
    noise = Image.frombytes("RGB", (64, 64), np.random.default_rng(0).bytes(64 * 64 * 3))
    assert "truncated" in refused(saved(noise, "JPEG")[:-100])
    program = saved(Image.new("RGB", (4, 4)), "EPS")
    assert refused(program) == "EPS is a program and no picture; save it as PNG"
    with pytest.raises(ValueError, match=r"^picture is missing$"):
        decode(None)
    with pytest.raises(
        ValueError, match=r"^picture '.*missing\.png' cannot be decoded \(there is no such file\)$"
    ):
        decode(tmp_path / "missing.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = png(np.zeros((4, 4), dtype=int), 8, 0)
    huge = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    header = b"IHDR" + huge
    blob = blob[:12] + header + struct.pack(">I", zlib.crc32(header)) + blob[33:]
    assert refused(blob) == "more than 178,956,970 pixels, which may be a decompression bomb"
    words = zlib.compress(bytes(2 * 2**20))
    text = (b"zTXt", b"name\0\0" + words)
    assert "too large" in refused(png(np.zeros((4, 4), dtype=int), 8, 0, text))


def test_pictures_of_an_edit_are_named_where_they_cannot_be_read(tmp_path: Path) -> None:
    good, bad, other = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "other.png"
    good.write_bytes(saved(Image.new("RGB", (8, 8), (10, 20, 30)), "PNG"))
    bad.write_bytes(good.read_bytes()[:50])
    other.write_bytes(saved(Image.new("RGB", (8, 9)), "PNG"))
    assert read_pictures((good,), unit(3)).shape == (3, 3, 8, 8)
    with pytest.raises(
        UserError,
        match=r"sampler\.source: cannot read '.*bad\.png' as a picture \(.*\); is the path right",
    ):
        read_pictures((good, bad), unit(2))
    with pytest.raises(UserError, match=r"sampler\.source: pictures must be of one size"):
        read_pictures((good, other), unit(2))
