"""Preference pairs over Ray Data: the reader of ``rlalign.data.preferences`` for sets that one process cannot decode in time.

Tasks on the cluster read and decode; this process shuffles in windows. The pairs of round r depend on (settings, seed, r) and
the files alone, not on the number of tasks or nodes. They are not those of the small reader: rows are shuffled within windows
of ``shuffle`` rows of the files in a keyed order, not across row groups.

What it costs: nothing is indexed, so a round is found by streaming its epoch up to it. The rounds of a run come one after
another; a resumed run streams past what it has seen (reading and decoding, at the cluster's speed).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from rlalign.arrow import REQUIRED, group_rows, pair_files
from rlalign.data.preferences import BadRows, Pair, PreferenceSettings, row_fault, to_pair
from rlalign.diffusion.noise import generator
from rlalign.registry import UserError

_BATCH = 64
"""Rows that a task decodes at once."""


class RayPairReader:
    """The pairs of each round, streamed by Ray Data. Ray must be running; the files must be readable on its nodes.

    ``keep`` chooses among captions. Raises UserError when there is no file, no usable pair, or too many bad rows.
    """

    def __init__(self, settings: PreferenceSettings, seed: int, keep: Callable[[str], bool] | None = None) -> None:
        self.settings, self.seed, self._keep = settings, seed, keep
        self._files = pair_files(settings.path)
        rows = sum(sum(group_rows(file)) for file in self._files)
        self.bad = BadRows(settings.path, rows, settings.bad_share)
        self._stream: Generator[Pair, None, None] | None = None
        self._next = -1
        """The round that the stream stands before; -1 for none."""

    def round(self, number: int) -> list[Pair]:
        """The pairs of round ``number`` >= 0. Rounds in their order are streamed; another one starts from the first."""
        if self._stream is None or number < self._next:
            self.close()
            self._stream, self._next = self._pairs(), 0
        while self._next < number:
            self._take()
        return self._take()

    def passes(self, number: int) -> Iterator[list[Pair]]:
        """The pairs of a round in slices of ``pairs_per_pass``."""
        pairs, step = self.round(number), self.settings.pairs_per_pass
        for start in range(0, len(pairs), step):
            yield pairs[start : start + step]

    def close(self) -> None:
        """Ends what Ray Data still reads; the next round starts anew. To be called before Ray is shut down."""
        if self._stream is not None:
            self._stream.close()
            self._stream, self._next = None, -1
            gc.collect()  # Ray Data leaves iterators in reference cycles, and they complain when they outlive Ray

    def _take(self) -> list[Pair]:
        assert self._stream is not None
        self._next += 1
        return [next(self._stream) for _ in range(self.settings.pairs_per_round)]

    def _pairs(self) -> Generator[Pair, None, None]:
        """Epoch after epoch, without end."""
        epoch = 0
        while True:
            found = 0
            for window, pairs in enumerate(self._windows(epoch)):
                found += len(pairs)
                for i in generator("pairs on ray", self.seed, "window", epoch, window).permutation(len(pairs)):
                    yield pairs[i]
            if not found:
                raise UserError(
                    f"preferences.path must hold at least one usable pair, got none in {self.settings.path!r}"
                )
            epoch += 1

    def _windows(self, epoch: int) -> Iterator[list[Pair]]:
        """Usable pairs in the epoch's order of files, in windows of ``shuffle``."""
        order = generator("pairs on ray", self.seed, "files", epoch).permutation(len(self._files))
        window: list[Pair] = []
        for pair in self._usable([self._files[int(i)] for i in order]):
            window.append(pair)
            if len(window) == self.settings.shuffle:
                yield window
                window = []
        if window:
            yield window

    def _usable(self, files: list[Path]) -> Iterator[Pair]:
        """The pairs of files in their order, decoded on the cluster; bad rows are counted by their numbers."""
        names = {str(file.resolve()): str(file) for file in files}
        numbers = dict.fromkeys(names, 0)
        context = ray.data.DataContext.get_current()
        before, context.execution_options.preserve_order = context.execution_options.preserve_order, True
        transform: Any = _decode  # Ray Data's annotations know neither keyword arguments nor that its iterators close
        options = {"size": self.settings.size, "ties": self.settings.ties}
        table = ray.data.read_parquet(list(names), include_paths=True)
        table = table.map_batches(transform, batch_size=_BATCH, fn_kwargs=options)
        stream: Any = iter(table.iter_batches(batch_size=_BATCH, batch_format="numpy"))
        try:
            for row in (dict(zip(b, values, strict=True)) for b in stream for values in zip(*b.values(), strict=True)):
                name = f"{names[row['path']]}:{numbers[row['path']]}"
                numbers[row["path"]] += 1
                if row["fault"]:
                    self.bad.add(name, row["fault"])
                elif row["used"] and (self._keep is None or self._keep(row["caption"])):
                    yield Pair(
                        caption=str(row["caption"]),
                        picture_0=_picture(row["picture_0"], row["shape_0"]),
                        picture_1=_picture(row["picture_1"], row["shape_1"]),
                        label_0=float(row["label_0"]),
                        row=name,
                        source=str(row["source"]),
                    )
        finally:
            stream.close()  # at once: an error's traceback would keep the tasks going
            context.execution_options.preserve_order = before


def _picture(blob: bytes, shape: np.ndarray) -> np.ndarray:
    return np.frombuffer(blob, dtype=np.uint8).reshape(tuple(shape))


def _decode(batch: dict[str, np.ndarray], size: int, ties: str) -> dict[str, list[Any]]:
    """Rows of a file -> one row each: its pair, or what is wrong with it, or that it is not used."""
    columns = ("path", "fault", "used", "caption", "label_0", "source", "picture_0", "shape_0", "picture_1", "shape_1")
    result: dict[str, list[Any]] = {name: [] for name in columns}
    for i in range(len(batch["caption"])):
        row = {
            name: _plain(batch[name][i])
            for name in (*REQUIRED, "has_label", "are_different", "model_0")
            if name in batch
        }
        one: dict[str, Any] = {
            "path": batch["path"][i],
            "fault": "",
            "used": False,
            "caption": "",
            "label_0": 0.0,
            "source": "",
        }
        one |= {"picture_0": b"", "shape_0": [0, 0, 0], "picture_1": b"", "shape_1": [0, 0, 0]}
        if row.get("has_label") is not False and row.get("are_different") is not False:
            one["fault"] = row_fault(row["caption"], row["label_0"], row["label_1"])
            if not one["fault"] and not (ties == "drop" and row["label_0"] == 0.5):
                one |= _pair(row, size)
        for name in columns:
            result[name].append(one[name])
    return result


def _pair(row: dict[str, Any], size: int) -> dict[str, Any]:
    try:
        pair = to_pair({**row, "row": ""}, size)
    except ValueError as error:
        return {"fault": str(error)}
    found: dict[str, Any] = {"used": True, "caption": pair.caption, "label_0": pair.label_0, "source": pair.source}
    for name, picture in (("0", pair.picture_0), ("1", pair.picture_1)):
        found |= {f"picture_{name}": picture.tobytes(), f"shape_{name}": list(picture.shape)}
    return found


def _plain(value: Any) -> Any:
    """A value of a NumPy column as Python's own; NaN, which stands for a missing number, as None."""
    found = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(found, float) and np.isnan(found) else found
