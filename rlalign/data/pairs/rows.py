"""Rows of preference pairs: read from Parquet, judged, decoded; for the small reader and Ray's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from rlalign.core.media import UnreadablePicture, read_picture
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
    """Two pictures of one caption, and which is preferred."""

    caption: str
    """With its record, where the set has one (``record``)."""
    picture_0: np.ndarray
    """(3, H, W) uint8."""
    picture_1: np.ndarray
    """(3, H, W) uint8."""
    label_0: float
    """1 where picture 0 is preferred, 0 where picture 1 is, 0.5 for a tie."""
    row: str
    """Where it is from: ``FILE:ROW``, rows counted from 0."""
    source: str = ""
    """Who made picture 0, where the set says so (``model_0``)."""
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
    """(3, H, W) uint8 of a picture file or its bytes, resized to ``size`` squared unless 0.

    Squashed, whatever its sides (bicubic); or its shorter side is resized (bilinear) and the centre
    cut out, as torchvision's Resize and CenterCrop do for the published trainers. Raises ValueError
    with the reason where it cannot be read.
    """
    from PIL import Image

    picture = _opened(source)
    if size and picture.size != (size, size):
        square = (size, size)
        if resize == "squash":
            picture = picture.resize(square, Image.Resampling.BICUBIC)
        else:
            picture, _ = cut_out(picture, square)
    return _pixels(picture)


def _opened(source: bytes | Path | None) -> Image:
    """A picture in RGB. Raises ValueError with the reason where it cannot be read."""
    if not source:
        raise ValueError("picture is missing")
    try:
        return read_picture(source)
    except UnreadablePicture as error:
        which = f" {str(source)!r}" if isinstance(source, Path) else ""
        raise ValueError(f"picture{which} cannot be decoded ({error})") from error


def _pixels(picture: Image) -> np.ndarray:
    """(3, H, W) uint8."""
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def to_pair(row: Mapping[str, Any], size: int, resize: Resize = "squash") -> Pair:
    """A row with its pictures decoded; with buckets, both of the size of the pair's. Raises
    ValueError, naming the column, when one cannot be."""
    names = ("jpg_0", "jpg_1")
    if resize != "buckets":
        first, second = (_named(name, lambda n: decode(row[n], size, resize)) for name in names)
        return _pair_of(row, picture_0=first, picture_1=second)

    # both shapes decide on the bucket
    pictures = [_named(name, lambda n: _opened(row[n])) for name in names]
    bucket = choose_bucket([(one.height, one.width) for one in pictures], size)
    (one, crop_0), (other, crop_1) = (cut_out(picture, bucket) for picture in pictures)
    return _pair_of(
        row, picture_0=_pixels(one), picture_1=_pixels(other), crop_0=crop_0, crop_1=crop_1
    )


def _named(name: str, read: Callable[[str], Read]) -> Read:
    """What is read of a column. Raises its ValueError again with the column's name."""
    try:
        return read(name)
    except ValueError as error:
        raise ValueError(f"{error} in {name}") from error


def _pair_of(row: Mapping[str, Any], **pictures: Any) -> Pair:
    return Pair(
        caption=with_record(row["caption"], row.get("record")),
        label_0=float(row["label_0"]),
        row=row["row"],
        source=row.get("model_0") or "",
        **pictures,
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
