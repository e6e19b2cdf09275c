"""Preference pairs over Ray Data: the reader of ``rlalign.data.pairs.reader`` for sets that one
process cannot decode in time.

It gives the small reader's pairs in the small reader's order: which rows a round has follows from
the same index and the same keys, and only the reading and decoding of pictures is done by tasks on
the cluster. The number of tasks or nodes changes nothing, and a resumed run reads from the window
that it is in.

What it costs beside the small reader: a window's pictures cross the object store decoded.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from rlalign.core.prompts import dump_record, with_record
from rlalign.core.registry import UserError
from rlalign.data.pairs.buckets import Crop
from rlalign.data.pairs.reader import PairReader
from rlalign.data.pairs.rows import Group, Pair, Resize, Undecodable, read_rows, to_pair

_BATCH = 64
"""Rows that a task decodes at once."""
_TASKS = 1000
"""Into which the rest of an epoch is cut at most; a task reads one slice of a row group after
another."""


class RayPairReader(PairReader):
    """The pairs of each round, decoded by Ray Data. Ray must be running; the files must be readable
    on its nodes.

    Settings, errors and pairs are those of ``PairReader``.
    """

    _stream: Generator[list[Pair | Undecodable], None, None] | None = None
    _next = (0, 0)
    """(epoch, window) that the stream stands before."""

    def close(self) -> None:
        """Ends what Ray Data still reads; the next round starts anew. To be called before Ray is
        shut down."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            # Ray Data leaves iterators in reference cycles, and they complain when they outlive Ray
            gc.collect()

    def _read(self, epoch: int, number: int) -> list[Any]:
        """The rows of a window, decoded, in the order of their groups."""
        if self._stream is None or self._next != (epoch, number):
            self.close()
            self._stream = self._windows(epoch, number)
        rows = next(self._stream)
        last = number + 1 == self._windows_per_epoch
        if last:
            self.close()
        self._next = (epoch + 1, 0) if last else (epoch, number + 1)
        return rows

    @property
    def _windows_per_epoch(self) -> int:
        return -(-len(self) // self.settings.shuffle)

    def _decode(self, row: Pair | Undecodable) -> Pair | Undecodable:
        return row

    def _windows(self, epoch: int, first: int) -> Generator[list[Pair | Undecodable], None, None]:
        """The windows of an epoch from ``first`` on."""
        numbers = range(first, self._windows_per_epoch)
        slices = [list(self._slices(epoch, number)) for number in numbers]
        items = [_item(one.group, one.numbers[chosen]) for part in slices for one, chosen in part]
        rows = self._rows_of(items)
        try:
            for part in slices:
                count = sum(chosen.stop - chosen.start for _, chosen in part)
                yield list(islice(rows, count))
        finally:
            rows.close()

    def _rows_of(self, items: list[dict[str, Any]]) -> Generator[Pair | Undecodable, None, None]:
        """The rows of slices of row groups in their order, decoded on the cluster."""
        context = ray.data.DataContext.get_current()
        before = context.execution_options.preserve_order
        context.execution_options.preserve_order = True
        # Ray Data's annotations know neither keyword arguments nor that its iterators close
        transform: Any = _decode
        how = {"size": self.settings.size, "resize": self.settings.resize, "frames": self.frames}
        table = ray.data.from_items(items, override_num_blocks=min(len(items), _TASKS))
        table = table.map_batches(transform, batch_size=1, fn_kwargs=how)
        stream: Any = iter(table.iter_batches(batch_size=_BATCH, batch_format="numpy"))
        try:
            for batch in stream:
                for values in zip(*batch.values(), strict=True):
                    yield _row(dict(zip(batch, values, strict=True)))
        finally:
            stream.close()  # at once: an error's traceback would keep the tasks going
            context.execution_options.preserve_order = before


def _item(group: Group, numbers: np.ndarray) -> dict[str, Any]:
    """A slice of a row group, as it travels to a task."""
    return {
        "file": str(group.file.resolve()),
        "index": group.index,
        "first": group.first,
        "name": str(group.file),
        "numbers": numbers.tolist(),
    }


def _row(row: dict[str, Any]) -> Pair | Undecodable:
    """A row as it came from a task. Raises UserError where its file could not be read."""
    if row["refused"]:
        raise UserError(str(row["refused"]))
    if row["fault"]:
        return Undecodable(row=str(row["row"]), why=str(row["fault"]))
    return Pair(
        caption=with_record(str(row["caption"]), str(row["record"])),
        media_0=_media(row["media_0"], row["shape_0"]),
        media_1=_media(row["media_1"], row["shape_1"]),
        label_0=float(row["label_0"]),
        row=str(row["row"]),
        source=str(row["source"]),
        crop_0=_crop(row["crop_0"]),
        crop_1=_crop(row["crop_1"]),
    )


def _crop(numbers: np.ndarray) -> Crop | None:
    return Crop(*(int(number) for number in numbers)) if numbers[0] else None


def _media(blob: bytes, shape: np.ndarray) -> np.ndarray:
    return np.frombuffer(blob, dtype=np.uint8).reshape(tuple(shape))


def _decode(
    batch: Mapping[str, Any], size: int, resize: Resize, frames: int = 0
) -> Iterator[dict[str, list[Any]]]:
    """Slices of row groups -> their rows, one each: its pair, or why it has none."""
    for slice_of in zip(*batch.values(), strict=True):
        # a row of the batch names one row group and the wanted rows in it
        item = dict(zip(batch, slice_of, strict=True))
        group = Group(
            file=Path(str(item["file"])), index=int(item["index"]), first=int(item["first"])
        )
        numbers = np.asarray(item["numbers"], dtype=np.int64)
        rows: list[dict[str, Any]] = []

        # rows leave in small tables, so that few pictures are in memory
        try:
            for row in read_rows(group, numbers=numbers, batch=_BATCH):
                number = row["row"].rpartition(":")[2]
                name = f"{item['name']}:{number}"
                rows.append({**_NOTHING, **_packed(row, size, resize, frames), "row": name})
                if len(rows) == _BATCH:
                    yield _columns(rows)
                    rows = []
        except UserError as error:  # as a row, since Ray would wrap it into its own
            rows.append({**_NOTHING, "refused": str(error)})
        if rows:
            yield _columns(rows)


_NOTHING: dict[str, Any] = {
    "row": "",
    "refused": "",
    "fault": "",
    "caption": "",
    "record": "",
    "label_0": 0.0,
    "source": "",
    "media_0": b"",
    "shape_0": [0, 0, 0, 0],
    "media_1": b"",
    "shape_1": [0, 0, 0, 0],
    "crop_0": [0, 0, 0, 0],
    "crop_1": [0, 0, 0, 0],
}
"""A row without a pair, as it travels."""


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in _NOTHING}


def _packed(row: dict[str, Any], size: int, resize: Resize, frames: int) -> dict[str, Any]:
    """A row's pair as columns, or what is wrong with its pictures."""
    try:
        pair = to_pair(row, size, resize, frames)
    except ValueError as error:
        return {"fault": str(error)}
    return {
        "caption": str(pair.caption),
        "record": dump_record(pair.caption),
        "label_0": pair.label_0,
        "source": pair.source,
        "media_0": pair.media_0.tobytes(),
        "shape_0": list(pair.media_0.shape),
        "media_1": pair.media_1.tobytes(),
        "shape_1": list(pair.media_1.shape),
        "crop_0": list(pair.crop_0 or _NOTHING["crop_0"]),
        "crop_1": list(pair.crop_1 or _NOTHING["crop_1"]),
    }
