"""Rows of preference pairs: read from Parquet, judged, decoded; for the small reader and Ray's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from rlalign.core.clips import read_frames
from rlalign.core.media import UnreadablePicture
from rlalign.core.prompts import with_record
from rlalign.core.registry import UserError
from rlalign.data.pairs.buckets import Crop, choose_bucket, cut_out
from rlalign.data.pairs.columns import REQUIRED, open_pairs
from rlalign.data.pairs.types import NO_TEXT, picture_source

if TYPE_CHECKING:
    from PIL.Image import Image

Read = TypeVar("Read")
WORDS = ("caption", "label_0", "label_1", "has_label", "are_different")
"""Columns that say whether a row is usable, its pictures aside."""
_SHOWN = 8
"""Bad rows that an error names, and the largest number kept for it."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures or clips of one caption, and which is preferred."""

    caption: str
    """With its record, where the set has one (``record``)."""
    media_0: np.ndarray
    """(F, 3, H, W) uint8; a picture has F = 1."""
    media_1: np.ndarray
    """(F, 3, H, W) uint8, of the same F."""
    label_0: float
    """1 where picture 0 is preferred, 0 where picture 1 is, 0.5 for a tie."""
    row: str
    """Where it is from: ``FILE:ROW``, rows counted from 0."""
    source: str = ""
    """Who made the first, where the set says so (``model_0``)."""
    crop_0: Crop | None = None
    """Of picture 0, where buckets are asked for."""
    crop_1: Crop | None = None


@dataclass(frozen=True, kw_only=True)
class Undecodable:
    """A row whose pictures cannot be decoded, and why."""

    row: str
    why: str


class BadRows:
    """Counts rows that cannot be used, and refuses the set when they are too many."""

    def __init__(self, path: str, rows: int, share: float) -> None:
        self.path, self.rows, self.share = path, rows, share
        self.found: dict[str, str] = {}
        """``FILE:ROW`` -> what is wrong with it."""

    def add(self, row: str, why: str) -> None:
        """Counts a row once. Raises UserError when the stated share is passed."""
        self.found[row] = why
        if len(self.found) > self.share * self.rows:
            shown = "; ".join(f"{r}: {w}" for r, w in list(self.found.items())[:_SHOWN])
            more = f"; and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
            raise UserError(
                f"preferences.bad_share must be >= the share of bad rows, got {self.share:g} with"
                f" at least {len(self.found)} bad of {self.rows} rows in {self.path}"
                f" ({shown}{more}); mend them, or raise bad_share"
            )


def row_fault(caption: object, label_0: object, label_1: object) -> str:
    """What is wrong with a row's words and labels; empty when nothing is."""
    if not isinstance(caption, str) or not caption.strip():
        return "caption is missing"
    if NO_TEXT in caption:
        return "caption is not UTF-8 text"
    if _is_missing(label_0) or _is_missing(label_1):
        return "one of its labels is missing"
    if label_0 not in (0.0, 0.5, 1.0) or label_0 + label_1 != 1.0:  # type: ignore[operator]
        return f"labels must be 1 and 0, 0 and 1, or 0.5 twice, got {label_0!r} and {label_1!r}"
    return ""


def why_left_out(row: Mapping[str, Any], ties: str) -> str:
    """Why the set itself says that there is nothing to learn from a row, as a plural; empty where
    there is.

    A tie says nothing where ``ties`` is "drop". The published trainer of Diffusion-DPO leaves the
    same rows out: those whose label is neither 0 nor 1.
    """
    labels = (row["label_0"], row["label_1"])
    if row.get("has_label") is False or all(_is_missing(label) for label in labels):
        return "without a label"
    if row.get("are_different") is False:
        return "with the same picture twice"
    if ties == "drop" and labels == (0.5, 0.5):
        return "ties"
    return ""


def _is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, float) and math.isnan(label))


Resize = Literal["squash", "crop", "buckets"]


def decode(source: bytes | Path | None, size: int = 0, resize: Resize = "squash") -> np.ndarray:
    """(F, 3, H, W) uint8 of a picture's or a clip's file or its bytes, frames resized to ``size``
    squared unless 0.

    Squashed, whatever its sides (bicubic); or its shorter side is resized (bilinear) and the centre
    cut out, as torchvision's Resize and CenterCrop do for the published trainers. Raises ValueError
    with the reason where it cannot be read.
    """
    return _resized(_opened(source), size, resize)


def _resized(frames: Sequence[Image], size: int, resize: Resize) -> np.ndarray:
    """(F, 3, H, W) uint8 of frames of one size, as ``decode`` has them."""
    from PIL import Image

    square = (size, size)
    if not size or frames[0].size == square:
        return _pixels(frames)
    if resize == "squash":
        return _pixels([one.resize(square, Image.Resampling.BICUBIC) for one in frames])
    return _pixels([cut_out(one, square)[0] for one in frames])


def _opened(source: bytes | Path | None) -> list[Image]:
    """Frames in RGB, one of a picture. Raises ValueError with the reason where they cannot be
    read."""
    if not source:
        raise ValueError("picture is missing")
    try:
        return read_frames(source)[0]
    except UnreadablePicture as error:
        which = f" {str(source)!r}" if isinstance(source, Path) else ""
        raise ValueError(f"picture{which} cannot be decoded ({error})") from error


def _pixels(frames: Sequence[Image]) -> np.ndarray:
    """(F, 3, H, W) uint8."""
    media_FHWC = np.stack([np.asarray(one) for one in frames])
    return np.ascontiguousarray(media_FHWC.transpose(0, 3, 1, 2))


def to_pair(row: Mapping[str, Any], size: int, resize: Resize = "squash", frames: int = 0) -> Pair:
    """A row with its pictures decoded; with buckets, both of the size of the pair's. ``frames`` are
    those that clips must have, 1 of pictures; 0 takes any.

    Raises ValueError, naming the column, when one cannot be decoded or has other frames.
    """
    sides = [_named(name, lambda n: _opened(row[n])) for name in ("jpg_0", "jpg_1")]
    _refuse_frames([len(side) for side in sides], frames)
    if resize != "buckets":
        first, second = (_resized(side, size, resize) for side in sides)
        return _pair_of(row, media_0=first, media_1=second)

    # both shapes decide on the bucket
    bucket = choose_bucket([(side[0].height, side[0].width) for side in sides], size)
    cuts = [[cut_out(one, bucket) for one in side] for side in sides]
    first, second = (_pixels([one for one, _ in side]) for side in cuts)
    crop_0, crop_1 = (side[0][1] for side in cuts)
    return _pair_of(row, media_0=first, media_1=second, crop_0=crop_0, crop_1=crop_1)


def _refuse_frames(found: Sequence[int], wanted: int) -> None:
    """Raises ValueError where the two sides of a pair have different numbers of frames, or others
    than are wanted."""
    first, second = found
    if first != second:
        raise ValueError(f"jpg_0 has {_counted(first)} and jpg_1 {_counted(second)}")
    if wanted and first != wanted:
        raise ValueError(f"its clips must have plan.frames ({wanted}), got {_counted(first)}")


def _counted(frames: int) -> str:
    return f"{frames} frame{'s' if frames > 1 else ''}"


def _named(name: str, read: Callable[[str], Read]) -> Read:
    """What is read of a column. Raises its ValueError again with the column's name."""
    try:
        return read(name)
    except ValueError as error:
        raise ValueError(f"{error} in {name}") from error


def _pair_of(row: Mapping[str, Any], **media: Any) -> Pair:
    return Pair(
        caption=with_record(row["caption"], row.get("record")),
        label_0=float(row["label_0"]),
        row=row["row"],
        source=row.get("model_0") or "",
        **media,
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """A row group of a file."""

    file: Path
    index: int
    first: int
    """Number of its first row within the file."""


def groups_of(file: Path, sizes: Sequence[int]) -> Iterator[Group]:
    """The row groups of a file, from the number of rows in each."""
    first = 0
    for index, size in enumerate(sizes):
        yield Group(file=file, index=index, first=first)
        first += size


def read_rows(
    group: Group,
    columns: Sequence[str] = (*REQUIRED, "model_0", "record"),
    numbers: np.ndarray | None = None,
    *,
    batch: int = 64,
) -> Iterator[dict[str, Any]]:
    """Rows of a group in their order, each with its name under "row".

    All of them, or those of the given ascending ``numbers``. Pictures are bytes, or the path of a
    file. ``batch`` rows are in memory at once.
    """
    import pyarrow as pa

    seen = given = 0

    # batch after batch; of each only the rows that are wanted
    for found in open_pairs(group.file, columns, groups=[group.index], batch=batch):
        inside = np.arange(seen, seen + found.num_rows)
        if numbers is not None:
            inside = numbers[(numbers >= seen) & (numbers < seen + found.num_rows)]
        for number, row in zip(
            inside.tolist(),
            found.take(pa.array(inside - seen, type=pa.int64())).to_pylist(),
            strict=True,
        ):
            for name in ("jpg_0", "jpg_1"):
                if name in row:
                    row[name] = picture_source(row[name], group.file.parent)
            yield {**row, "row": f"{group.file}:{group.first + number}"}
        seen += found.num_rows
        given += len(inside)
        if numbers is not None and given == len(numbers):
            break
