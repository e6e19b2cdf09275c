"""Preference pairs from Parquet files: the pairs of round r depend on (settings, seed, r) alone.

An epoch visits the row groups of all files in a keyed order; their usable rows, in that order, are cut into windows of
``shuffle`` rows, and each window is shuffled by its own key. So the place of a pair follows from arithmetic, and a resumed run
reads the window it is in and nothing before it.

What it costs: opening reads the captions and labels of every row once (no pictures), 16 bytes are kept per usable row; a
window's encoded pictures are in memory, and a row group that two windows share is read for each.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.arrow import REQUIRED, group_rows, open_pairs, pair_files
from rlalign.diffusion.noise import generator
from rlalign.registry import UserError

Ties = Literal["drop", "half"]
_SHOWN = 8
"""Bad rows that an error names, and the largest number kept for it."""


class PreferenceSettings(BaseModel):
    """Where preference pairs come from, and how they are dealt out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(description="Parquet file, folder of them, or glob; columns as in Pick-a-Pic v2")
    pairs_per_round: int = Field(default=64, ge=1, description="pairs of a round, or of one update of fit-reward")
    pairs_per_pass: int = Field(default=16, ge=1, description="pairs that go through the network at once")
    ties: Ties = Field(default="drop", description="a tie is dropped, or counts as half a win for both")
    bad_share: float = Field(default=0.01, ge=0.0, le=1.0, description="largest share of bad rows before it is refused")
    shuffle: int = Field(
        default=1024, ge=1, description="rows of a shuffle window; 1 keeps the order of the row groups"
    )
    size: int = Field(default=0, ge=0, description="pixels to which pictures are resized (squared); 0 as they are")
    reader: Literal["arrow", "ray"] = Field(
        default="arrow", description="arrow reads in the learner; ray streams through Ray Data, for sets of many files"
    )
    workers: int = Field(
        default=0, ge=0, le=64, description="threads that decode pictures; the order does not depend on it"
    )

    @model_validator(mode="after")
    def _passes_fit(self) -> PreferenceSettings:
        if self.pairs_per_pass > self.pairs_per_round:
            raise ValueError(
                f"pairs_per_pass must be <= pairs_per_round ({self.pairs_per_round}), got {self.pairs_per_pass}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures of one caption, and which is preferred."""

    caption: str
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
                f"preferences.bad_share must be >= the share of bad rows, got {self.share:g} with at least "
                f"{len(self.found)} bad of {self.rows} rows in {self.path} ({shown}{more}); mend them, or raise bad_share"
            )


def row_fault(caption: object, label_0: object, label_1: object) -> str:
    """What is wrong with a row's words and labels; empty when nothing is."""
    if not isinstance(caption, str) or not caption.strip():
        return "caption is missing"
    if label_0 is None or label_1 is None:
        return "label is missing"
    if label_0 not in (0.0, 0.5, 1.0) or label_0 + label_1 != 1.0:  # type: ignore[operator]
        return f"labels must be 1 and 0, 0 and 1, or 0.5 twice, got {label_0!r} and {label_1!r}"
    return ""


def decode(blob: bytes | None, size: int = 0) -> np.ndarray:
    """(3, H, W) uint8 of a JPEG or PNG file's bytes, resized to ``size`` squared unless 0. Raises ValueError."""
    from PIL import Image, UnidentifiedImageError

    if not blob:
        raise ValueError("picture is missing")
    try:
        with Image.open(io.BytesIO(blob), formats=("JPEG", "PNG")) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("picture cannot be decoded") from error
    if size and picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A row group and which of its rows are usable."""

    file: Path
    index: int
    first: int
    """Number of its first row within the file."""
    usable: np.ndarray
    """(N,) int64 row numbers within the group, ascending."""


class Pairing(Protocol):
    """Pairs of preferences by round, whoever reads them."""

    seed: int

    def passes(self, number: int) -> Iterator[list[Pair]]:
        """The pairs of a round in slices of ``pairs_per_pass``."""
        ...


class PairReader:
    """The pairs of each round, from any number of Parquet files.

    ``keep`` chooses among captions (a split by prompt, say). ``counts`` has the usable pairs of each kept caption's number.
    Raises UserError when there is no file, no usable pair, or too many bad rows.
    """

    def __init__(self, settings: PreferenceSettings, seed: int, keep: Callable[[str], bool] | None = None) -> None:
        self.settings, self.seed = settings, seed
        layout = [(file, group_rows(file)) for file in pair_files(settings.path)]
        self.bad = BadRows(settings.path, sum(sum(sizes) for _, sizes in layout), settings.bad_share)
        self.counts: Counter[str] = Counter()
        self._keep = keep
        self._groups = [group for file, sizes in layout for group in self._index(file, sizes)]
        self._count = sum(len(group.usable) for group in self._groups)
        self._window: tuple[tuple[int, int], list[Mapping[str, Any]]] | None = None
        if not self._count:
            which = " of the captions asked for" if keep is not None and self.bad.rows else ""
            raise UserError(
                f"preferences.path must hold at least one usable pair, got none{which} in {settings.path!r}"
            )

    def __len__(self) -> int:
        """Usable pairs: the length of an epoch."""
        return self._count

    def _index(self, file: Path, sizes: Sequence[int]) -> Iterator[_Group]:
        """The usable rows of a file, from its captions and labels."""
        columns = ("caption", "label_0", "label_1", "has_label", "are_different")
        first = 0
        for index, size in enumerate(sizes):
            usable, number = [], 0
            for batch in open_pairs(file, columns, groups=[index], batch=4096):
                for row in batch.to_pylist():
                    if self._usable(row, f"{file}:{first + number}"):
                        usable.append(number)
                    number += 1
            yield _Group(file=file, index=index, first=first, usable=np.array(usable, dtype=np.int64))
            first += size

    def _usable(self, row: Mapping[str, Any], name: str) -> bool:
        if row.get("has_label") is False or row.get("are_different") is False:
            return False  # the set itself says that there is nothing to learn from
        why = row_fault(row["caption"], row["label_0"], row["label_1"])
        if why:
            self.bad.add(name, why)
            return False
        if self._keep is not None and not self._keep(row["caption"]):
            return False
        if self.settings.ties == "drop" and row["label_0"] == 0.5:
            return False
        self.counts[row["caption"]] += 1
        return True

    def round(self, number: int) -> list[Pair]:
        """The pairs of round ``number`` >= 0. Every epoch visits each usable row once, whatever the round's size."""
        size, count = self.settings.pairs_per_round, len(self)
        places = [divmod(place, count) for place in range(number * size, (number + 1) * size)]
        if self.settings.workers:
            with ThreadPoolExecutor(self.settings.workers) as pool:
                rows = [self._rows(epoch, place) for epoch, place in places]  # read in order, decoded by threads
                return list(pool.map(lambda found: self._pair(*found), rows))
        return [self._pair(*self._rows(epoch, place)) for epoch, place in places]

    def passes(self, number: int) -> Iterator[list[Pair]]:
        """The pairs of a round in slices of ``pairs_per_pass``."""
        pairs, step = self.round(number), self.settings.pairs_per_pass
        for start in range(0, len(pairs), step):
            yield pairs[start : start + step]

    def all(self) -> Iterator[Pair]:
        """Every usable pair once, in the order of the files (undecodable ones counted and left out)."""
        for group in self._groups:
            for row in _read(group, group.usable):
                pair = self._decoded(row)
                if pair is not None:
                    yield pair

    def _rows(self, epoch: int, place: int) -> tuple[list[Mapping[str, Any]], int]:
        """(window, index): the shuffled window that holds a place of an epoch, and where in it."""
        number, index = divmod(place, self.settings.shuffle)
        if self._window is None or self._window[0] != (epoch, number):
            self._window = ((epoch, number), self._load(epoch, number))
        return self._window[1], index

    def _load(self, epoch: int, number: int) -> list[Mapping[str, Any]]:
        """The rows of a window, encoded, in their shuffled order."""
        order = generator("pairs", self.seed, "groups", epoch).permutation(len(self._groups))
        ends = np.cumsum([len(self._groups[i].usable) for i in order])
        start, stop = number * self.settings.shuffle, min((number + 1) * self.settings.shuffle, len(self))
        rows: list[Mapping[str, Any]] = []
        at = start
        while at < stop:
            nth = bisect_right(ends.tolist(), at)
            group = self._groups[int(order[nth])]
            offset = at - (int(ends[nth]) - len(group.usable))
            chosen = group.usable[offset : offset + stop - at]
            rows += _read(group, chosen)
            at += len(chosen)
        shuffled = generator("pairs", self.seed, "window", epoch, number).permutation(len(rows))
        return [rows[i] for i in shuffled]

    def _pair(self, window: list[Mapping[str, Any]], index: int) -> Pair:
        """The pair at an index; in the place of one that cannot be decoded stands one from half a window further on."""
        tries = [index, *((index + len(window) // 2 + k) % len(window) for k in range(len(window)))]
        for at in tries:
            pair = self._decoded(window[at])
            if pair is not None:
                return pair
        raise UserError(
            f"preferences.path: no picture of {len(window)} rows in a row of {self.settings.path!r} can be decoded"
        )

    def _decoded(self, row: Mapping[str, Any]) -> Pair | None:
        try:
            return to_pair(row, self.settings.size)
        except ValueError as error:
            self.bad.add(row["row"], str(error))
            return None


def to_pair(row: Mapping[str, Any], size: int) -> Pair:
    """A row with its pictures decoded. Raises ValueError when one cannot be."""
    return Pair(
        caption=row["caption"],
        picture_0=decode(row["jpg_0"], size),
        picture_1=decode(row["jpg_1"], size),
        label_0=float(row["label_0"]),
        row=row["row"],
        source=row.get("model_0") or "",
    )


def _read(group: _Group, numbers: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a group by their ascending numbers, each with its name under "row"."""
    import pyarrow as pa

    rows, seen = [], 0
    for batch in open_pairs(group.file, (*REQUIRED, "model_0"), groups=[group.index]):
        inside = numbers[(numbers >= seen) & (numbers < seen + batch.num_rows)]
        taken = batch.take(pa.array(inside - seen, type=pa.int64())).to_pylist()
        rows += [
            {**row, "row": f"{group.file}:{group.first + n}"} for n, row in zip(inside.tolist(), taken, strict=True)
        ]
        seen += batch.num_rows
        if len(rows) == len(numbers):
            break
    return rows
