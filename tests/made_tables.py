"""Parquet files of preference pairs in every type that people write their columns in, made from a
seed, with what they say."""

from __future__ import annotations

import base64
import decimal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.made_pictures import saved

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Hugging Face's Image feature."""


@dataclass(kw_only=True)
class Made:
    """A file and what its rows say."""

    what: str
    file: Path
    refused: str = ""
    """The column for whose type the file must be refused; empty where it must be read."""
    usable: dict[int, tuple[str, int, int, float, str]] = field(default_factory=dict)
    """Row -> caption, the grey of picture 0 and of picture 1, label 0, model 0."""
    bad: set[int] = field(default_factory=set)
    """Rows that must be called bad."""


def png(level: int) -> bytes:
    """A picture of one grey."""
    return saved(Image.new("RGB", (3, 2), (level,) * 3), "PNG")


Values = list[Any]
Column = tuple[Callable[[Values, Path], Values], pa.DataType, bool]
"""(values as the file has them, their type, whether it is read)."""


def _as_they_are(values: Values, folder: Path) -> Values:
    return values


def _each(change: Callable[[Any], Any]) -> Callable[[Values, Path], Values]:
    return lambda values, folder: [None if one is None else change(one) for one in values]


def _in_files(values: Values, folder: Path) -> Values:
    """Pictures beside the Parquet file, every other one; None stays as it is, once as a null struct
    and once as one of nulls."""
    found: Values = []
    for number, blob in enumerate(values):
        if blob is None:
            found.append(None if number % 2 else {"bytes": None, "path": None})
        elif number % 2:
            file = folder / "pictures" / f"{len(list(folder.rglob('*.png')))}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(blob)
            found.append({"bytes": None, "path": str(file.relative_to(folder))})
        else:
            found.append({"bytes": blob, "path": "not there.png"})
    return found


PICTURES: dict[str, Column] = {
    "binary": (_as_they_are, pa.binary(), True),
    "large binary": (_as_they_are, pa.large_binary(), True),
    "binary view": (_as_they_are, pa.binary_view(), True),
    "dictionary of binary": (_as_they_are, pa.dictionary(pa.int32(), pa.binary()), True),
    "fixed-size binary": (_each(lambda b: b + bytes(200 - len(b))), pa.binary(200), True),
    "struct": (_each(lambda b: {"bytes": b, "path": None}), IMAGE, True),
    "struct of bytes": (
        _each(lambda b: {"bytes": b}),
        pa.struct([("bytes", pa.large_binary())]),
        True,
    ),
    "struct without paths": (
        _each(lambda b: {"path": None, "bytes": b}),
        pa.struct([("path", pa.null()), ("bytes", pa.binary())]),
        True,
    ),
    "struct and files": (_in_files, IMAGE, True),
    "base64": (_each(lambda b: base64.b64encode(b).decode()), pa.string(), False),
    "base64, large": (_each(lambda b: base64.b64encode(b).decode()), pa.large_string(), False),
    "list": (_each(list), pa.list_(pa.uint8()), False),
    "large list": (_each(list), pa.large_list(pa.uint8()), False),
    "list of bytes": (_each(lambda b: [b]), pa.list_(pa.binary()), False),
    "list of structs": (_each(lambda b: [{"bytes": b, "path": None}]), pa.list_(IMAGE), False),
    "struct of text": (
        _each(lambda b: {"bytes": "x", "path": None}),
        pa.struct([("bytes", pa.string())]),
        False,
    ),
    "struct of a path": (_each(lambda b: {"path": "x"}), pa.struct([("path", pa.string())]), False),
    "numbers": (_each(len), pa.int64(), False),
    "nothing": (_each(lambda b: None), pa.null(), False),
}

LABELS: dict[str, Column] = {
    "float64": (_as_they_are, pa.float64(), True),
    "float32": (_as_they_are, pa.float32(), True),
    "float16": (_each(np.float16), pa.float16(), True),
    "int64": (_each(int), pa.int64(), True),
    "uint8": (_each(int), pa.uint8(), True),
    "bool": (_each(bool), pa.bool_(), True),
    "decimal": (_each(lambda v: decimal.Decimal(str(v))), pa.decimal128(5, 2), True),
    "large decimal": (_each(lambda v: decimal.Decimal(str(v))), pa.decimal256(50, 3), True),
    "dictionary": (_as_they_are, pa.dictionary(pa.int8(), pa.float64()), True),
    "text": (_each(str), pa.string(), False),
    "list": (_each(lambda v: [v]), pa.list_(pa.float64()), False),
    "time": (_each(int), pa.timestamp("s"), False),
    "nothing": (_each(lambda v: None), pa.null(), False),
}

CAPTIONS: dict[str, Column] = {
    "string": (_as_they_are, pa.string(), True),
    "large string": (_as_they_are, pa.large_string(), True),
    "string view": (_as_they_are, pa.string_view(), True),
    "dictionary": (_as_they_are, pa.dictionary(pa.int16(), pa.string()), True),
    "binary": (_each(str.encode), pa.binary(), False),
    "list": (_each(lambda t: [t]), pa.list_(pa.string()), False),
    "number": (_each(len), pa.int32(), False),
    "nothing": (_each(lambda t: None), pa.null(), False),
}

FLAGS: dict[str, Column] = {
    "bool": (_as_they_are, pa.bool_(), True),
    "int8": (_each(int), pa.int8(), True),
    "nothing": (_each(lambda v: None), pa.null(), True),
    "text": (_each(str), pa.string(), False),
}

MODELS: dict[str, Column] = {
    "string": (_as_they_are, pa.string(), True),
    "dictionary": (_as_they_are, pa.dictionary(pa.int8(), pa.large_string()), True),
    "int32": (_each(int), pa.int32(), True),
    "nothing": (_each(lambda v: None), pa.null(), True),
    "list": (_each(lambda v: [v]), pa.list_(pa.string()), False),
}

BY_COLUMN = {
    "caption": CAPTIONS,
    "jpg_0": PICTURES,
    "jpg_1": PICTURES,
    "label_0": LABELS,
    "label_1": LABELS,
    "has_label": FLAGS,
    "are_different": FLAGS,
    "model_0": MODELS,
}
"""Of the eight columns, the types that they are tried in; the last three are left out now and
then."""

_WORDS = ("a red circle", "ein grüner Kreis", "赤い丸", "a \U0001f600", "x\u2028y")


def make(seed: int, folder: Path) -> Made:
    """The table of a seed, in one file of one or more row groups. Ties count as half; one table in
    three is to be refused."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 24))
    rows = [_row(rng) for _ in range(count)]
    names = [name for name in BY_COLUMN if name in list(BY_COLUMN)[:5] or rng.random() < 0.5]
    kinds = {
        name: str(rng.choice([k for k, (_, _, read) in BY_COLUMN[name].items() if read]))
        for name in names
    }
    made = Made(what=f"seed {seed}: {count} rows, {kinds}", file=folder / "pairs.parquet")
    wrong = [
        (name, kind) for name in names for kind, (_, _, read) in BY_COLUMN[name].items() if not read
    ]
    if seed % 3 == 0:
        made.refused, kind = wrong[seed // 3 % len(wrong)]
        kinds[made.refused] = kind
        made.what += f", but {made.refused} as {kind}"
    arrays: dict[str, pa.Array] = {"other": pa.array([{"deep": [1]}] * count)}
    for name in names:
        change, kind, _ = BY_COLUMN[name][kinds[name]]
        values = [_fitting(kinds[name], row[name]) for row in rows]
        arrays[name] = _array(change(values, folder), kind)
        for row, value in zip(rows, values, strict=True):
            row[name] = None if kinds[name] == "nothing" else value
    pq.write_table(pa.table(arrays), made.file, row_group_size=int(rng.integers(1, count + 1)))
    for number, row in enumerate(rows):
        _judge(made, number, {name: row[name] for name in names})
    return made


def _row(rng: np.random.Generator) -> dict[str, Any]:
    label = float(rng.choice([0.0, 1.0, 0.5]))
    level_0, level_1 = (int(n) for n in rng.integers(0, 256, 2))
    row: dict[str, Any] = {
        "caption": str(rng.choice(_WORDS)),
        "jpg_0": png(level_0),
        "jpg_1": png(level_1),
    }
    row |= {"label_0": label, "label_1": 1.0 - label, "has_label": True, "are_different": True}
    row["model_0"] = str(rng.integers(0, 9)) if rng.random() < 0.8 else None
    fault = rng.random()
    if fault < 0.05:
        row[str(rng.choice(["caption", "jpg_0", "jpg_1", "label_0", "label_1"]))] = None
    elif fault < 0.1:
        row[str(rng.choice(["jpg_0", "jpg_1"]))] = row["jpg_0"][:40]
    elif fault < 0.15:
        row[str(rng.choice(["has_label", "are_different"]))] = False
    elif fault < 0.2:
        row["label_1"] = label
    return row


def _fitting(kind: str, value: Any) -> Any:
    """A value that a type can hold: a tie in whole numbers is none."""
    return 1.0 if value == 0.5 and kind in ("int64", "uint8", "bool", "time") else value


def _array(values: Values, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.DictionaryType):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def _judge(made: Made, number: int, row: dict[str, Any]) -> None:
    """Writes down whether a row is usable, bad, or ruled out by the set itself."""
    if row.get("has_label") is False or row.get("are_different") is False:
        return
    whole = [blob is not None and len(blob) > 60 for blob in (row["jpg_0"], row["jpg_1"])]
    labels = (row["label_0"], row["label_1"])
    if (
        row["caption"] is None
        or not all(whole)
        or labels not in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
    ):
        made.bad.add(number)
        return
    levels = [
        int(np.asarray(Image.open(_stream(row[name])))[0, 0, 0]) for name in ("jpg_0", "jpg_1")
    ]
    made.usable[number] = (
        row["caption"],
        levels[0],
        levels[1],
        labels[0],
        row.get("model_0") or "",
    )


def _stream(blob: bytes) -> Any:
    import io

    return io.BytesIO(blob)
