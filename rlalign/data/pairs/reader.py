"""Preference pairs from files: the pairs of round r depend on (settings, seed, r) alone.

An epoch visits the row groups of all files in a keyed order; their usable rows, in that order, are
cut into windows of ``shuffle`` rows, and each window is shuffled by its own key. So the place of a
pair follows from arithmetic, and a resumed run reads the window it is in and nothing before it.

What it costs: opening reads the captions and labels of every row once (no pictures), 16 bytes are
kept per usable row; a window's encoded pictures are in memory, and a row group that two windows
share is read for each.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import group_rows, pair_files
from rlalign.data.pairs.growing import GrowingPairs
from rlalign.data.pairs.rows import (
    WORDS,
    BadRows,
    Group,
    Pair,
    Undecodable,
    groups_of,
    read_rows,
    row_fault,
    to_pair,
    why_left_out,
)
from rlalign.data.pairs.rows import decode as decode
from rlalign.data.pairs.settings import Pairing, PreferenceSettings
from rlalign.data.pairs.settings import Ties as Ties
from rlalign.diffusion.noise import generator

_MANY = 4096
_FEW = 8
"""Rows that are in memory at once without their pictures, and with them where one is looked for."""
_MOST_THREADS = 8
"""That decode pictures."""


@dataclass(frozen=True, kw_only=True)
class _Usable:
    """A row group and which of its rows are usable."""

    group: Group
    numbers: np.ndarray
    """(N,) int64 row numbers within the group, ascending."""

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, chosen: slice = slice(None)) -> Iterator[dict[str, Any]]:
        """Its usable rows with their pictures, or some of them."""
        return read_rows(self.group, numbers=self.numbers[chosen])


class PairReader(Pairing):
    """The pairs of each round, from any number of files.

    ``keep`` chooses among captions (a split by prompt, say); ``frames`` are those of every picture
    or clip, 0 takes any of which a pair has the same. ``counts`` has the usable pairs of
    each kept caption's number, ``left_out`` how many rows say nothing, by reason. Raises UserError
    when there is no file, no usable pair, or too many bad rows.
    """

    def __init__(
        self,
        settings: PreferenceSettings,
        seed: int,
        keep: Callable[[str], bool] | None = None,
        *,
        frames: int = 0,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.frames = frames
        files, self.bad = _open_set(settings)
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._keep = keep
        self._groups = list(self._index(files))
        self._count = sum(len(group) for group in self._groups)
        self._window: tuple[tuple[int, int], list[Any]] | None = None
        if not self._count:
            which = " of the captions asked for" if keep is not None and self.bad.rows else ""
            raise UserError(
                f"preferences.path must hold at least one usable pair, got none{which} in"
                f" {settings.path!r}"
            )

    def __len__(self) -> int:
        """Usable pairs: the length of an epoch."""
        return self._count

    @property
    def captions(self) -> list[str]:
        """The captions of usable pairs, each once."""
        return list(self.counts)

    @property
    def note(self) -> str:
        parts = [f"{count:,} {why}" for why, count in sorted(self.left_out.items())]
        if self.bad.found:
            parts.append(f"{len(self.bad.found):,} that cannot be used")
        if not parts:
            return ""
        return f"{', '.join(parts)} are left out of {self.bad.rows:,} rows of pairs"

    def _index(self, files: Mapping[Path, Sequence[int]]) -> Iterator[_Usable]:
        """The usable rows of the files, from their captions and labels."""
        for group in _row_groups(files):
            rows = read_rows(group, WORDS, batch=_MANY)
            numbers = [number for number, row in enumerate(rows) if self._is_usable(row)]
            yield _Usable(group=group, numbers=np.array(numbers, dtype=np.int64))

    def _is_usable(self, row: Mapping[str, Any]) -> bool:
        out = why_left_out(row, self.settings.ties)
        if out:
            self.left_out[out] += 1
            return False
        why = row_fault(row["caption"], row["label_0"], row["label_1"])
        if why:
            self.bad.add(row["row"], why)
            return False
        if self._keep is not None and not self._keep(row["caption"]):
            return False
        self.counts[row["caption"]] += 1
        return True

    def round(self, number: int) -> list[Pair]:
        """The pairs of round ``number`` >= 0. Every epoch visits each usable row once, whatever the
        round's size."""
        size = self.settings.pairs_per_round
        count = len(self)
        places = [divmod(place, count) for place in range(number * size, (number + 1) * size)]
        rows = [self._rows(epoch, place) for epoch, place in places]
        # pictures are decoded by threads; what is wrong with them is counted in order
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            firsts = list(pool.map(lambda one: self._decode(one[0][one[1]]), rows))
        return [self._pair(*row, first) for row, first in zip(rows, firsts, strict=True)]

    def all(self) -> Iterator[Pair]:
        """Every usable pair once, in the order of the files (undecodable ones counted and left
        out)."""
        for group in self._groups:
            for row in group.rows():
                pair = self._counted(self._decode(row))
                if pair is not None:
                    yield pair

    def _rows(self, epoch: int, place: int) -> tuple[list[Any], int]:
        """(window, index): the shuffled window that holds a place of an epoch, and where in it."""
        number, index = divmod(place, self.settings.shuffle)
        if self._window is None or self._window[0] != (epoch, number):
            self._window = ((epoch, number), self._load(epoch, number))
        return self._window[1], index

    def _load(self, epoch: int, number: int) -> list[Any]:
        """The rows of a window in their shuffled order."""
        rows = self._read(epoch, number)
        shuffled = generator("pairs", self.seed, "window", epoch, number).permutation(len(rows))
        return [rows[i] for i in shuffled]

    def _read(self, epoch: int, number: int) -> list[Any]:
        """The rows of a window, encoded, in the order of their groups."""
        rows: list[Mapping[str, Any]] = []
        for group, chosen in self._slices(epoch, number):
            rows += group.rows(chosen)
        return rows

    def _slices(self, epoch: int, number: int) -> Iterator[tuple[_Usable, slice]]:
        """The row groups that a window is in, and which of their usable rows it has."""
        order = generator("pairs", self.seed, "groups", epoch).permutation(len(self._groups))
        ends = np.cumsum([len(self._groups[i]) for i in order])
        at = number * self.settings.shuffle
        stop = min(at + self.settings.shuffle, len(self))
        while at < stop:
            nth = bisect_right(ends.tolist(), at)
            group = self._groups[int(order[nth])]
            offset = at - (int(ends[nth]) - len(group))
            chosen = slice(offset, min(offset + stop - at, len(group)))
            yield group, chosen
            at += chosen.stop - chosen.start

    def _pair(self, window: list[Any], index: int, first: Pair | Undecodable) -> Pair:
        """The pair at an index, whose decoding is ``first``; in the place of one that cannot be
        decoded stands one from half a window further on."""
        pair = self._counted(first)
        start = index + len(window) // 2
        for at in range(start, start + len(window)):
            if pair is not None:
                return pair
            pair = self._counted(self._decode(window[at % len(window)]))
        if pair is not None:
            return pair
        raise UserError(
            f"preferences.path: no picture of {len(window)} rows in a row of {self.settings.path!r}"
            " can be decoded"
        )

    def _decode(self, row: Any) -> Pair | Undecodable:
        try:
            return to_pair(row, self.settings.size, self.settings.resize, self.frames)
        except ValueError as error:
            return Undecodable(row=row["row"], why=str(error))

    def _counted(self, found: Pair | Undecodable) -> Pair | None:
        if isinstance(found, Pair):
            return found
        self.bad.add(found.row, found.why)
        return None


def open_pairs_of(
    settings: PreferenceSettings, seed: int, frames: int = 0
) -> PairReader | GrowingPairs:
    """The pairs that settings name: of files, or of people's votes; ``frames`` as in
    ``PairReader``."""
    if settings.ballots is not None:
        return GrowingPairs(settings, seed, frames=frames)
    return PairReader(settings, seed, frames=frames)


def _open_set(settings: PreferenceSettings) -> tuple[dict[Path, list[int]], BadRows]:
    """The rows of each row group of each file, and the count of bad rows."""
    files = {file: group_rows(file) for file in pair_files(settings.path)}
    return files, BadRows(settings.path, sum(map(sum, files.values())), settings.bad_share)


def _row_groups(files: Mapping[Path, Sequence[int]]) -> Iterator[Group]:
    for file, sizes in files.items():
        yield from groups_of(file, sizes)


def first_pair(settings: PreferenceSettings, frames: int = 0) -> Pair | None:
    """The first usable pair of a set as training would read it; None where there is none.
    ``frames`` as in ``PairReader``.

    Raises UserError where a file or column is none of pairs, a store none of votes, or where more
    rows before it are bad than may be.
    """
    if settings.ballots is not None:
        with contextlib.closing(GrowingPairs(settings, 0, frames=frames)) as votes:
            return votes.first()

    # a few rows are read at a time, since the first pair is wanted alone
    files, bad = _open_set(settings)
    columns = (*WORDS, "jpg_0", "jpg_1", "model_0")
    groups = (read_rows(group, columns, batch=_FEW) for group in _row_groups(files))
    for row in chain.from_iterable(groups):
        # rows that training passes over are passed over here
        if why_left_out(row, settings.ties):
            continue
        fault = row_fault(row["caption"], row["label_0"], row["label_1"])

        # a faulty row is counted, and the next one is tried
        try:
            if not fault:
                return to_pair(row, settings.size, settings.resize, frames)
        except ValueError as error:
            fault = str(error)
        bad.add(row["row"], fault)
    return None
