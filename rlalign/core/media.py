"""Media as uint8, as floats, as images and as files; the one reader of picture files that a user
gives.

A file is read as a viewer shows it, in 8-bit RGB.

EXIF orientation is applied. What is transparent shows white. Animated files and files of several
pages give their first picture. Every mode that Pillow opens is scaled to 0..255: grey of 16 bits by
65535, of 12 bits by 4095, colours of 16 bits as Pillow opens them (their higher byte). Colour
profiles are not applied. 8-bit RGB and grey are as Pillow converts them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.core.records import Space
from rlalign.core.registry import read_reason

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright, 2 to 8 are the seven other ways to hold a camera."""
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0
"""Tags of TIFF, and a value of the second."""
_GREY_LEVELS = {"L;2": 3, "L;4": 15}
"""Pillow's name for packed grey -> its largest value."""
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
"""Brands of pictures in MP4's container."""
_RUNS_A_PROGRAM = ("EPS",)
"""Formats that Pillow hands to another program."""

_BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise of a damaged file."""


def as_uint8(media_BFCHW: torch.Tensor) -> np.ndarray:
    """Media in [0, 1] as uint8. Raises NotFinite: of a NaN the nearest byte would be 0, which is
    black."""
    import torch

    from rlalign.core.finite import refuse

    refuse(media_BFCHW, "the policy's decoder")
    return (media_BFCHW.detach() * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def as_arrays(samples: Mapping[Space, torch.Tensor]) -> dict[Space, np.ndarray]:
    """Samples as they travel and are scored: media in [0, 1] as uint8, clean latents as float32.
    Raises NotFinite."""
    import torch

    from rlalign.core.finite import refuse

    found: dict[Space, np.ndarray] = {}
    for space, values in samples.items():
        if space == "media":
            found[space] = as_uint8(values)
        else:
            refuse(values, "the policy's chain")
            found[space] = values.detach().to(torch.float32).cpu().numpy()
    return found


def as_floats(media: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """uint8 media as float32 in [0, 1]; the array may be a read-only view."""
    import torch

    return torch.from_numpy(np.array(media)).to(device).float() / 255.0


def to_image(pixels_CHW: np.ndarray) -> Image:
    """A uint8 picture (3, H, W) as a Pillow image."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)))


def encode_image(picture: Image, format: str, **settings: Any) -> bytes:
    """The bytes of a picture's file, as "png" or "jpeg"."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format.upper(), **settings)
    return buffer.getvalue()


class UnreadablePicture(ValueError):
    """A picture that is not read, with the reason in a few words.

    Whoever caught it knows the file or the row.
    """


def read_picture(source: bytes | Path) -> Image:
    """The picture in a file, or in a file's bytes, as a Pillow image of mode RGB.

    Raises UnreadablePicture for what is missing, no picture, truncated, too large to be one (a
    decompression bomb), or of values whose range is not known.
    """
    with open_picture(source) as opened:
        return picture_at(opened)


def video_format(blob: bytes) -> str:
    """The name of a video format that these bytes of a file begin with; "" for others."""
    if blob[4:8] == b"ftyp" and blob[8:12] not in _STILLS:
        return "MP4"
    if blob[:4] == b"\x1aE\xdf\xa3":
        return "WebM"
    return "AVI" if blob[:4] == b"RIFF" and blob[8:12] == b"AVI " else ""


@contextmanager
def open_picture(source: bytes | Path) -> Iterator[Image]:
    """A picture's file, open in Pillow. Whatever is raised of it inside becomes
    UnreadablePicture."""
    from PIL import Image, UnidentifiedImageError

    blob = _content(source) if isinstance(source, Path) else source
    if not blob:
        raise UnreadablePicture("the file is empty")
    if video := video_format(blob):
        raise UnreadablePicture(
            f"{video} is a lossy video, whose frames are not those that were drawn; save the clip"
            " as lossless animated WebP or PNG"
        )
    # one reason in a few words, whatever Pillow raises
    try:
        with Image.open(io.BytesIO(blob)) as opened:
            if opened.format in _RUNS_A_PROGRAM:
                raise UnreadablePicture(
                    f"{opened.format} is a program and no picture; save it as PNG"
                )
            yield opened
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePicture("no picture that Pillow knows") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadablePicture(
            f"more than {limit:,} pixels, which may be a decompression bomb"
        ) from error
    except _BROKEN as error:
        raise UnreadablePicture(read_reason(error)) from error


def picture_at(opened: Image) -> Image:
    """What an open file stands at: its picture, or the frame that was sought, in RGB."""
    packing = _packing(opened)  # gone once the pixels are there
    opened.load()
    return _upright(_to_rgb(opened, packing), opened)


def _content(file: Path) -> bytes:
    """The bytes of a regular file; a device, which may have no end, is none."""
    try:
        if not file.is_file():
            raise UnreadablePicture("it is no file" if file.exists() else "there is no such file")
        return file.read_bytes()
    except OSError as error:
        raise UnreadablePicture(error.strerror or type(error).__name__) from error


def _packing(opened: Image) -> str:
    """How the file packs its values, in Pillow's words, as "L;4" for grey of 4 bits; or ""."""
    tiles: Any = getattr(opened, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _to_rgb(picture: Image, packing: str) -> Image:
    """A loaded picture of any mode in RGB, on white where it is transparent."""
    if picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format in ("PNG", "PPM")
    ):
        return _deep_grey(picture)
    if picture.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if picture.mode == "I" else "floating point numbers"
        raise UnreadablePicture(
            f"its values are {kind}, whose range is not known; save it with 8 or 16 bits"
        )
    # colours that are already multiplied by their alpha
    if picture.mode in ("La", "RGBa"):
        values_HWC = np.asarray(picture).astype(np.uint16)
        return _from_pixels(np.minimum(values_HWC[..., :-1] + (255 - values_HWC[..., -1:]), 255))
    if picture.mode in ("1", "L", "RGB") and picture.info.get("transparency") is not None:
        return _one_colour_clear(picture, packing)
    if picture.has_transparency_data:
        rgba_HWC = np.asarray(picture.convert("RGBA"))
        return _on_white(rgba_HWC[..., :3], rgba_HWC[..., 3])
    return picture.convert("RGB")


def _deep_grey(picture: Image) -> Image:
    """Grey of more than 8 bits, to the nearest of 256 levels."""
    values_HW = np.asarray(picture).astype(np.uint32)
    tags: Any = getattr(picture, "tag_v2", {})
    largest = 4095 if tuple(tags.get(_BITS_PER_SAMPLE, ())) == (12,) else 65535
    alpha_HW = np.where(values_HW == picture.info.get("transparency", -1), 0, 255)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values_HW = largest - values_HW
    return _on_white(((values_HW * 255 + largest // 2) // largest)[..., None], alpha_HW)


def _one_colour_clear(picture: Image, packing: str) -> Image:
    """Grey or RGB of which the file says that one value is transparent (PNG's tRNS, GIF's grey)."""
    clear = np.array(picture.info["transparency"], dtype=np.int64).reshape(-1)
    if packing.startswith("RGB;16"):
        # stored with 16 bits, of which the pixels have kept 8
        clear >>= 8
    elif packing in _GREY_LEVELS:
        clear = clear * 255 // _GREY_LEVELS[packing]
    elif picture.mode == "1":
        clear = np.where(clear > 0, 255, 0)
    colours_HWC = np.asarray(picture.convert("RGB"))
    return _on_white(colours_HWC, np.where((colours_HWC == clear).all(axis=-1), 0, 255))


def _on_white(colours_HWC: np.ndarray, alpha_HW: np.ndarray) -> Image:
    """Colours (one or three channels, 0..255) over white by their alpha (0..255), rounded."""
    alpha_HW1 = alpha_HW[..., None].astype(np.uint16)
    return _from_pixels(
        (colours_HWC.astype(np.uint16) * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255
    )


def _from_pixels(values_HWC: np.ndarray) -> Image:
    """An RGB image of values in 0..255 with one or three channels."""
    from PIL import Image

    pixels_HWC = np.broadcast_to(values_HWC, (*values_HWC.shape[:2], 3)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels_HWC))


def read_tag(opened: Image, tag: int) -> Any:
    """A tag of an open file's EXIF or XMP, once its pixels are there; None where it has none, or
    one that cannot be read."""
    try:
        return opened.getexif().get(tag)
    except _BROKEN:
        return None


def _upright(picture: Image, opened: Image) -> Image:
    """The picture turned as the file's EXIF or XMP says; as it lies where they cannot be read."""
    from PIL.Image import Transpose

    orientation = read_tag(opened, _ORIENTATION)
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)
