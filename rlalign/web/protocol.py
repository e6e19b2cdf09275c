"""What a reward's client and its server say to each other over HTTP: JSON with pictures as PNG.
Pure functions.

``POST /score`` takes ``{"prompts": [B strings], "media": [[a PNG in base64 per frame] per
sample]}``, and with prompts that carry records ``"records": [B objects or null]``. It answers
``{"scores": [B numbers or null], "reward": title}``; null is a failed score.
``GET /health`` answers ``{"reward": title, ...}``. Whatever is refused is answered with ``{"error":
"one sentence"}``. Nothing that arrives is unpickled or evaluated, and sizes are read off before
anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlalign.core.files import parse_strict_json
from rlalign.core.media import encode_image, to_image
from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError
from rlalign.web.refused import Refused

MAX_BODY_BYTES = 64 * 2**20
MAX_SAMPLES = 256
MAX_FRAMES = 256
MAX_SIDE = 8192
MAX_PIXELS = 64 * 2**20
"""Of all frames of a request together: 64 pictures of 1024 x 1024."""
MAX_PROMPT_CHARACTERS = 10_000
MAX_RECORD_BYTES = 2**16
"""Of one prompt's record as JSON."""
MAX_ANSWER_BYTES = 2**20

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BROKEN_PNG = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises of a damaged file."""


# --- a request -----------------------------------------------------------------------------------


def requests_of(
    media_BFCHW: np.ndarray, prompts: Sequence[str], most: int
) -> Iterator[tuple[int, bytes]]:
    """(samples in it, body) of each request: uint8 media, at most ``most`` samples in one, and
    within every limit above.

    Raises UserError for a sample that is too large for any request.
    """
    # a sample has to fit into a request at all
    frames, height, width = media_BFCHW.shape[1], *media_BFCHW.shape[-2:]
    pixels = frames * height * width
    if pixels > MAX_PIXELS or frames > MAX_FRAMES or max(height, width) > MAX_SIDE:
        raise UserError(
            f"a sample of {frames} frames of {width} x {height} is too large for a reward over"
            f" HTTP: at most {MAX_FRAMES} frames, sides of {MAX_SIDE} and {MAX_PIXELS:,} pixels;"
            " score it in the run"
        )
    most = min(most, MAX_SAMPLES, MAX_PIXELS // pixels)

    # as many samples in a request as fit
    samples: list[_Sample] = []
    size = 0
    for prompt, media_FCHW in zip(prompts, media_BFCHW, strict=True):
        sample = _Sample(
            name=_name_of(prompt),
            record=_record_of(prompt),
            media=json.dumps([base64.b64encode(png(f)).decode() for f in media_FCHW]),
        )
        more = sum(map(len, sample)) + 6
        if more + 96 > MAX_BODY_BYTES:
            raise UserError(
                f"a sample of {more:,} bytes is too large for a request of {MAX_BODY_BYTES:,}"
                " over HTTP; score it in the run, or draw smaller pictures or fewer frames"
            )
        if samples and (len(samples) == most or size + more + 96 > MAX_BODY_BYTES):
            yield len(samples), _body(samples)
            samples = []
            size = 0
        samples.append(sample)
        size += more
    if samples:
        yield len(samples), _body(samples)


class _Sample(NamedTuple):
    """What a request says of a sample, each as JSON."""

    name: str
    record: str
    media: str


def _name_of(prompt: str) -> str:
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"a prompt over HTTP has at most {MAX_PROMPT_CHARACTERS:,} characters, got"
            f" {len(prompt):,}"
        )
    return json.dumps(prompt)


def _record_of(prompt: str) -> str:
    record = record_of(prompt)
    said = json.dumps(dict(record), allow_nan=False) if record else "null"
    if len(said) > MAX_RECORD_BYTES:
        raise UserError(
            f"a prompt's record over HTTP has at most {MAX_RECORD_BYTES:,} bytes as JSON, got"
            f" {len(said):,} of {prompt[:40]!r}; leave fields out by the prompts' record"
        )
    return said


def _body(samples: list[_Sample]) -> bytes:
    """A request; without a word of records where no prompt has one, which older servers need."""
    names, records, pictures = map(", ".join, zip(*samples, strict=True))
    said = f', "records": [{records}]' if any(s.record != "null" for s in samples) else ""
    return f'{{"prompts": [{names}]{said}, "media": [{pictures}]}}'.encode()


def png(picture_CHW: np.ndarray) -> bytes:
    """A uint8 picture as PNG, 8-bit RGB, lossless."""
    return encode_image(to_image(picture_CHW), "png", compress_level=1)


def read_request(body: bytes) -> tuple[np.ndarray, list[str]]:
    """(uint8 media BFCHW, prompts with their records) of a request's body. Raises Refused: 400
    where it is malformed, 413 where too large."""
    # the shape of the whole
    found = _json(body)
    if not isinstance(found, dict) or set(found) - {"records"} != {"prompts", "media"}:
        raise Refused(
            400,
            'the body must be a JSON object with the keys "prompts" and "media", perhaps "records",'
            " and no others",
        )
    prompts = found["prompts"]
    media = found["media"]
    if (
        not isinstance(prompts, list)
        or not isinstance(media, list)
        or not prompts
        or len(prompts) != len(media)
    ):
        raise Refused(400, "prompts and media must be lists of the same length, at least 1")
    if len(prompts) > MAX_SAMPLES:
        raise Refused(413, f"a request has at most {MAX_SAMPLES} samples, got {len(prompts)}")

    # every prompt
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not _is_text(prompt):
            raise Refused(400, f"prompts[{i}] must be text")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise Refused(413, f"prompts[{i}] has more than {MAX_PROMPT_CHARACTERS:,} characters")

    # every sample has the same number of frames
    frames = len(media[0]) if isinstance(media[0], list) else 0
    if frames < 1 or any(not isinstance(sample, list) or len(sample) != frames for sample in media):
        raise Refused(
            400,
            "media must hold one list of frames per sample, all with the same number, at least 1",
        )
    if frames > MAX_FRAMES:
        raise Refused(413, f"a sample has at most {MAX_FRAMES} frames, got {frames}")
    if "records" in found:
        prompts = _with_records(prompts, found["records"])
    return _pictures(media, frames), prompts


def _with_records(prompts: list[str], records: Any) -> list[str]:
    if not isinstance(records, list) or len(records) != len(prompts):
        raise Refused(400, "records must be a list of an object or null for each prompt")
    for i, record in enumerate(records):
        if record is None:
            continue
        if not isinstance(record, dict):
            raise Refused(400, f"records[{i}] must be an object or null")
        if len(json.dumps(record)) > MAX_RECORD_BYTES:
            raise Refused(413, f"records[{i}] has more than {MAX_RECORD_BYTES:,} bytes")
    pairs = zip(prompts, records, strict=True)
    return [Prompt(prompt, record) if record else prompt for prompt, record in pairs]


def _json(body: bytes) -> Any:
    try:
        return parse_strict_json(body.decode("utf-8"))
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply") from error
    except ValueError as error:
        # not UTF-8, not JSON, NaN, a key twice, a number of thousands of digits
        raise Refused(
            400, "the body must be JSON in UTF-8, without NaN, Infinity or a key that appears twice"
        ) from error


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _pictures(media: list[list[Any]], frames: int) -> np.ndarray:
    """(B, F, 3, H, W) uint8. Every size is checked before the first picture is decoded."""
    # sizes first: what is too large is never decoded
    files: list[bytes] = []
    first: tuple[int, int] | None = None
    for i, sample in enumerate(media):
        for j, text in enumerate(sample):
            place = f"media[{i}][{j}]"
            try:
                file = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
            except (binascii.Error, ValueError) as error:
                raise Refused(400, f"{place} must be a PNG in base64") from error
            size, file = _checked(file, place)
            first = first or size
            if size != first:
                raise Refused(
                    400,
                    f"{place} is {size[0]} x {size[1]} and the first {first[0]} x {first[1]}: one"
                    " size",
                )
            if (len(files) + 1) * size[0] * size[1] > MAX_PIXELS:
                raise Refused(413, f"a request has at most {MAX_PIXELS:,} pixels in all its frames")
            files.append(file)
    assert first is not None

    # then the pixels
    media_NHWC = np.empty((len(files), first[1], first[0], 3), dtype=np.uint8)
    for n, file in enumerate(files):
        media_NHWC[n] = _decoded(file, f"media[{n // frames}][{n % frames}]")
    return np.ascontiguousarray(media_NHWC.transpose(0, 3, 1, 2)).reshape(
        -1, frames, 3, first[1], first[0]
    )


def _checked(file: bytes, place: str) -> tuple[tuple[int, int], bytes]:
    """((width, height), the file with only the chunks that make the picture); no pixel is decoded.

    Chunks that a reader may skip (texts, colour profiles, clocks) are left out: some of them unpack
    to any size.
    """
    # the header says size and kind
    if len(file) < 33 or not file.startswith(_SIGNATURE) or file[8:16] != b"\0\0\0\rIHDR":
        raise Refused(400, f"{place} must be a PNG in base64")
    width, height, *kind = struct.unpack(">IIBBBBB", file[16:29])
    if kind != [8, 2, 0, 0, 0]:
        raise Refused(
            400,
            f"{place} must be an RGB picture of 8 bits a channel, not interlaced, without"
            " transparency",
        )
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise Refused(
            413, f"{place} must have sides from 1 to {MAX_SIDE} pixels, got {width} x {height}"
        )

    # chunk after chunk to the end of the picture
    parts = [_SIGNATURE]
    at = len(_SIGNATURE)
    while at + 12 <= len(file):
        length = int.from_bytes(file[at : at + 4], "big")
        name = file[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(file):
            break
        if name in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(file[at:end])
        at = end
        if name == b"IEND":
            return (width, height), b"".join(parts)
    raise Refused(400, f"{place} is not a whole PNG")


def _decoded(file: bytes, place: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:
            picture.load()
            pixels_HWC = np.asarray(picture)
    except _BROKEN_PNG as error:
        raise Refused(400, f"{place} is not a whole PNG") from error
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise Refused(400, f"{place} must be an RGB picture of 8 bits a channel")
    return pixels_HWC


# --- an answer -----------------------------------------------------------------------------------


def scores_body(score_B: np.ndarray, title: str) -> bytes:
    """The answer to a request; a score that is not finite is null. float32 survives the way
    unchanged."""
    scores = [float(s) if math.isfinite(s) else None for s in score_B]
    return json.dumps({"scores": scores, "reward": title}, allow_nan=False).encode()


def read_scores(body: bytes, count: int) -> list[float]:
    """The scores of an answer, NaN where one has failed. Raises ValueError with the rule that it
    breaks."""
    try:
        found = parse_strict_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("the answer must be JSON") from error
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)}" if isinstance(scores, list) else "none"
        raise ValueError(
            f'the answer must hold "scores", a list of {count} numbers or nulls, got {got}'
        )
    return [_number(score, i) for i, score in enumerate(scores)]


def _number(score: Any, i: int) -> float:
    if score is None:
        return math.nan
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float)
        or not abs(score) <= float(np.finfo(np.float32).max)
    ):
        raise ValueError(
            f"scores[{i}] must be a number that float32 holds, or null, got {str(score)[:40]!r}"
        )
    return float(score)


def read_error(body: bytes) -> str:
    """What an answer says is wrong, one line; "" where it says nothing that can be read."""
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return ""
    said = found.get("error") if isinstance(found, dict) else None
    line = said.strip().splitlines()[0] if isinstance(said, str) and said.strip() else ""
    return "".join(c for c in line if c.isprintable())[:300]
