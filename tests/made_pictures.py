"""Picture files of every mode, format, orientation and fault, made from a seed, with the pixels
that a viewer shows.

The expected pixels are computed here with NumPy from the values that were written, or, where a
format loses some, from the values that Pillow's decoder gives before any conversion.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file and what it shows."""

    what: str
    """How it was made, for an assertion's message."""
    blob: bytes
    shown: np.ndarray | None
    """(H, W, 3) uint8; None where no viewer could know, so that it must be refused."""
    off: int = 0
    """By how much a reader may differ from ``shown``: what rounding in a change of colour space
    leaves open."""


def png(values: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given depth and colour type, whose rows of values are packed here; chunks stand
    before the pixels."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = (
            ((rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1)
            .reshape(height, -1)
            .astype(np.uint8)
        )
        packed = [np.packbits(row).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def saved(picture: Image.Image, kind: str, **more: Any) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours over white, in real numbers, rounded at the end."""
    share = (alpha / 255.0)[..., None]
    return np.round(colours * share + 255.0 * (1.0 - share)).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    """One channel as three."""
    return np.repeat(values[..., None], 3, axis=-1).astype(np.uint8)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels as EXIF says to show them: its eight cases by where the first row and the first
    column lie."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation](pixels)


def exif(orientation: int) -> bytes:
    """EXIF that says an orientation and nothing else."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


# --- one function a kind: (rng, height, width) -> (blob by keyword arguments of Pillow's save,
# shown, off) --------------

Writer = Callable[..., bytes]
Kind = Callable[[np.random.Generator, int, int], tuple[Writer, np.ndarray | None, int]]


def _bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _lossless(
    mode: str, kind: str, shown: Callable[[np.ndarray], np.ndarray], channels: int, **how: Any
) -> Kind:
    """Values of a mode in a lossless format."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = (
            _bytes(rng, height, width, channels) if channels > 1 else _bytes(rng, height, width)
        )
        if channels in (2, 4) and mode in ("LA", "RGBA"):
            values[..., -1] = np.where(
                rng.random((height, width)) < 0.5, rng.choice([0, 255]), values[..., -1]
            )
        picture = Image.frombytes(mode, (width, height), values.tobytes())
        return lambda **more: saved(picture, kind, **how, **more), shown(values), 0

    return make


def _palette(kind: str, transparency: str) -> Kind:
    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        index, colours = rng.integers(0, 16, (height, width), dtype=np.uint8), _bytes(rng, 16, 3)
        picture = Image.frombytes("P", (width, height), index.tobytes())
        picture.putpalette(colours.tobytes())
        alpha, how = np.full(16, 255), {}
        if transparency == "index":
            alpha[3], how = 0, {"transparency": 3}
        elif transparency == "bytes":
            alpha = rng.integers(0, 256, 16)
            how = {"transparency": bytes(alpha.tolist())}
        return (
            lambda **more: saved(picture, kind, **how, **more),
            on_white(colours[index], alpha[index]),
            0,
        )

    return make


def _deep_png(colour: int, channels: int, *, clear: bool = False) -> Kind:
    """PNG of 16 bits. Grey goes to the nearest of 256 levels; Pillow opens colours by their higher
    byte."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = rng.integers(0, 65536, (height, width, channels))
        alpha = values[..., -1] >> 8 if channels in (2, 4) else np.full((height, width), 255)
        colours = (
            np.round(values / 257.0)
            if channels == 1
            else values[..., : channels - (channels in (2, 4))] >> 8
        )
        chunks = []
        if clear:
            chosen = values[height // 2, width // 2]
            chunks = [(b"tRNS", struct.pack(f">{channels}H", *chosen.tolist()))]
            alpha = np.where((values == chosen).all(-1), 0, 255)
        shown = on_white(np.broadcast_to(colours, (height, width, 3)), alpha)
        return lambda: png(values, 16, colour, *chunks), shown, 0

    return make


def _shallow_png(depth: int, *, clear: bool) -> Kind:
    """Grey of 1, 2 or 4 bits, perhaps with one value that is transparent."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = rng.integers(0, 2**depth, (height, width))
        chosen = int(rng.integers(0, 2**depth))
        alpha = np.where(values == chosen, 0, 255) if clear else np.full((height, width), 255)
        chunks = [(b"tRNS", struct.pack(">H", chosen))] if clear else []
        return (
            lambda: png(values, depth, 0, *chunks),
            on_white(grey(values * 255 // (2**depth - 1)), alpha),
            0,
        )

    return make


def _clear_colour(mode: str) -> Kind:
    """8-bit grey or RGB of which PNG calls one value transparent."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = rng.integers(0, 3, (height, width, len(mode)), dtype=np.uint8) * 100
        chosen = values[0, 0].tolist()
        picture = Image.frombytes(mode, (width, height), values.tobytes())
        how = {"transparency": chosen[0] if mode == "L" else tuple(chosen)}
        alpha = np.where((values == values[0, 0]).all(-1), 0, 255)
        shown = on_white(np.broadcast_to(values, (height, width, 3)), alpha)
        return lambda **more: saved(picture, "PNG", **how, **more), shown, 0

    return make


def _deep_tiff(order: str, *, white_is_zero: bool = False) -> Kind:
    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = rng.integers(0, 65536, (height, width)).astype(f"{order}u2")
        mode = "I;16B" if order == ">" else "I;16"
        picture = Image.frombytes(mode, (width, height), values.tobytes())
        how = {"tiffinfo": {262: 0}} if white_is_zero else {}
        shown = 65535.0 - values if white_is_zero else values.astype(float)
        return (
            lambda **more: saved(picture, "TIFF", **how, **more),
            grey(np.round(shown / 257.0)),
            0,
        )

    return make


def _no_range(mode: str, kind: str) -> Kind:
    """Values whose range nobody knows."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, None, int]:
        values = rng.random((height, width)).astype(np.float32)
        picture = Image.fromarray(values if mode == "F" else (values * 1e6).astype(np.int32))
        return lambda **more: saved(picture, kind, **more), None, 0

    return make


def _lossy(mode: str, kind: str, **how: Any) -> Kind:
    """What Pillow's decoder gives, before any conversion, of a format that loses some."""

    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        picture = Image.frombytes(
            mode, (width, height), _bytes(rng, height, width, len(mode)).tobytes()
        )
        stored = np.asarray(Image.open(io.BytesIO(saved(picture, kind, **how))))
        shown = (
            grey(stored) if stored.ndim == 2 else cmyk(stored) if stored.shape[2] == 4 else stored
        )
        return lambda **more: saved(picture, kind, **how, **more), shown, 1 if mode == "CMYK" else 0

    return make


def cmyk(values: np.ndarray) -> np.ndarray:
    """Inks in 0..255, 255 for all of it, as RGB without a profile."""
    ink = values / 255.0
    return np.round(255.0 * (1.0 - ink[..., :3]) * (1.0 - ink[..., 3:])).astype(np.uint8)


def _ycbcr(values: np.ndarray) -> np.ndarray:
    """JPEG's full-range YCbCr (ITU-T T.871) as RGB."""
    y, cb, cr = (values[..., i].astype(float) for i in range(3))
    red, blue = y + 1.402 * (cr - 128.0), y + 1.772 * (cb - 128.0)
    green = y - 0.344136 * (cb - 128.0) - 0.714136 * (cr - 128.0)
    return np.clip(np.round(np.stack([red, green, blue], axis=-1)), 0, 255).astype(np.uint8)


def _within(kind: Kind, off: int) -> Kind:
    def make(
        rng: np.random.Generator, height: int, width: int
    ) -> tuple[Writer, np.ndarray | None, int]:
        writer, shown, _ = kind(rng, height, width)
        return writer, shown, off

    return make


def _one_bit(kind: str) -> Kind:
    def make(rng: np.random.Generator, height: int, width: int) -> tuple[Writer, np.ndarray, int]:
        values = rng.integers(0, 2, (height, width), dtype=np.uint8) * 255
        return (
            lambda **more: saved(Image.fromarray(values).convert("1"), kind, **more),
            grey(values),
            0,
        )

    return make


def _rgba(values: np.ndarray) -> np.ndarray:
    return on_white(values[..., :3], values[..., 3])


def _la(values: np.ndarray) -> np.ndarray:
    return on_white(grey(values[..., 0]), values[..., 1])


def _premultiplied(values: np.ndarray) -> np.ndarray:
    """Colours that are already multiplied by their alpha: white shows through by the rest."""
    alpha = values[..., -1:].astype(int)
    shown = np.minimum(values[..., :-1].astype(int) + 255 - alpha, 255)
    return np.broadcast_to(shown, (*shown.shape[:2], 3)).astype(np.uint8)


def _multiplied(kind: Kind) -> Kind:
    """TIFF with alpha, whose tag ExtraSamples then says that colours are multiplied by it (1) and
    not that they are not (2)."""
    tag = struct.pack("<HHI", 338, 3, 1)

    def make(
        rng: np.random.Generator, height: int, width: int
    ) -> tuple[Writer, np.ndarray | None, int]:
        writer, shown, off = kind(rng, height, width)
        return lambda **more: writer(**more).replace(tag + b"\2\0", tag + b"\1\0"), shown, off

    return make


KINDS: dict[str, Kind] = {
    "1 PNG": _one_bit("PNG"),
    "1 TIFF": _one_bit("TIFF"),
    "L PNG": _lossless("L", "PNG", grey, 1),
    "L GIF": _lossless("L", "GIF", grey, 1),
    "L TIFF": _lossless("L", "TIFF", grey, 1),
    "L BMP": _lossless("L", "BMP", grey, 1),
    "L JPEG": _lossy("L", "JPEG", quality=90),
    "L with a clear value PNG": _clear_colour("L"),
    "LA PNG": _lossless("LA", "PNG", _la, 2),
    "LA TIFF": _lossless("LA", "TIFF", _la, 2),
    "La TIFF": _multiplied(_lossless("LA", "TIFF", _premultiplied, 2)),
    "grey of 1 bit PNG": _shallow_png(1, clear=False),
    "grey of 1 bit with a clear value PNG": _shallow_png(1, clear=True),
    "grey of 2 bits PNG": _shallow_png(2, clear=False),
    "grey of 2 bits with a clear value PNG": _shallow_png(2, clear=True),
    "grey of 4 bits with a clear value PNG": _shallow_png(4, clear=True),
    "P PNG": _palette("PNG", ""),
    "P with a clear index PNG": _palette("PNG", "index"),
    "P with alphas PNG": _palette("PNG", "bytes"),
    "P GIF": _palette("GIF", ""),
    "P with a clear index GIF": _palette("GIF", "index"),
    "P TIFF": _palette("TIFF", ""),
    "RGB PNG": _lossless("RGB", "PNG", lambda v: v, 3),
    "RGB WEBP": _lossless("RGB", "WEBP", lambda v: v, 3, lossless=True),
    "RGB TIFF": _lossless("RGB", "TIFF", lambda v: v, 3, compression="tiff_lzw"),
    "RGB PPM": _lossless("RGB", "PPM", lambda v: v, 3),
    "RGB JPEG": _lossy("RGB", "JPEG", quality=90),
    "RGB progressive JPEG": _lossy("RGB", "JPEG", quality=90, progressive=True),
    "RGB lossy WEBP": _lossy("RGB", "WEBP", quality=80),
    "RGB JPEG2000": _lossy("RGB", "JPEG2000"),
    "RGB with a clear colour PNG": _clear_colour("RGB"),
    "RGBA PNG": _lossless("RGBA", "PNG", _rgba, 4),
    "RGBA WEBP": _lossless("RGBA", "WEBP", _rgba, 4, lossless=True, exact=True),
    "RGBA TIFF": _lossless("RGBA", "TIFF", _rgba, 4, compression="tiff_adobe_deflate"),
    "RGBa TIFF": _within(_multiplied(_lossless("RGBA", "TIFF", _premultiplied, 4)), 1),
    "RGBX TIFF": _lossless("RGBX", "TIFF", lambda v: v[..., :3], 4),
    "CMYK TIFF": _within(_lossless("CMYK", "TIFF", cmyk, 4), 1),
    "CMYK JPEG": _lossy("CMYK", "JPEG", quality=90),
    "YCbCr TIFF": _within(_lossless("YCbCr", "TIFF", _ycbcr, 3), 1),
    "grey of 16 bits PNG": _deep_png(0, 1),
    "grey of 16 bits with a clear value PNG": _deep_png(0, 1, clear=True),
    "RGB of 16 bits PNG": _deep_png(2, 3),
    "RGB of 16 bits with a clear colour PNG": _deep_png(2, 3, clear=True),
    "grey and alpha of 16 bits PNG": _deep_png(4, 2),
    "RGBA of 16 bits PNG": _deep_png(6, 4),
    "I;16 TIFF": _deep_tiff("<"),
    "I;16 TIFF, white is zero": _deep_tiff("<", white_is_zero=True),
    "I;16B TIFF": _deep_tiff(">"),
    "I TIFF": _no_range("I", "TIFF"),
    "F TIFF": _no_range("F", "TIFF"),
}
"""How a picture is stored -> what makes one."""

TURNED = ("PNG", "JPEG", "WEBP", "TIFF")
ANIMATED = (
    "L GIF",
    "P GIF",
    "P with a clear index GIF",
    "RGB WEBP",
    "RGBA WEBP",
    "RGB PNG",
    "RGBA PNG",
    "RGB TIFF",
)


def make(seed: int) -> Made:
    """The picture of a seed: of any kind and size, perhaps turned, perhaps with more frames."""
    rng = np.random.default_rng(seed)
    name = list(KINDS)[seed % len(KINDS)]
    height, width = (int(n) for n in rng.integers(1, 40, 2))
    writer, shown, off = KINDS[name](rng, height, width)
    how: dict[str, Any] = {}
    orientation = int(rng.integers(1, 9))
    if (
        name.split()[-1] in TURNED and rng.random() < 0.6 and writer.__code__.co_flags & 0x08
    ):  # takes keyword arguments
        how["exif"] = exif(orientation)
        shown = None if shown is None else turned(shown, orientation)
    if name in ANIMATED and rng.random() < 0.6:
        mode = name.split()[0]
        others = [
            Image.frombytes(mode, (width, height), _bytes(rng, height, width, len(mode)).tobytes())
        ]
        how |= {"save_all": True, "append_images": others * int(rng.integers(1, 3))}
    what = (
        f"seed {seed}: {name}, {height} x {width}, {', '.join(how) or 'plain'}, orientation"
        f" {orientation}"
    )
    return Made(what=what, blob=writer(**how), shown=shown, off=off)
