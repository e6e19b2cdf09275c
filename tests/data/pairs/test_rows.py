"""Rows of pairs as people write them: each column type is read right or refused by name, and each
bad row is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader, PreferenceSettings, first_pair
from rlalign.data.pairs.rows import Pair
from tests import made_tables

COUNTS = [60, pytest.param(500, marks=pytest.mark.slow)]


def settings(path: Path, **changes: object) -> PreferenceSettings:
    values = {
        "path": str(path),
        "pairs_per_round": 4,
        "pairs_per_pass": 2,
        "ties": "half",
        "bad_share": 1.0,
    }
    return PreferenceSettings.model_validate(values | changes)


def refused(path: Path, **changes: object) -> str:
    """The one message of a set that is refused, the same whether it is checked or read."""
    messages = []
    for read in (first_pair, lambda given: list(PairReader(given, 0).all())):
        with pytest.raises(UserError) as caught:
            read(settings(path, **changes))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


def number(row: str) -> int:
    return int(row.rsplit(":", 1)[1])


# tables made from seeds 0, 1, 2 and so on


@pytest.mark.parametrize("count", COUNTS)
def test_tables_of_every_type_say_what_was_written_or_are_refused_by_column(
    tmp_path: Path, count: int
) -> None:
    for seed in range(count):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = made_tables.make(seed, folder)
        if made.refused:
            message = refused(folder)
            kind = pq.read_schema(made.file).field(made.refused).type
            assert message.startswith(f"{made.file}: column {made.refused!r} must hold "), made.what
            assert message.endswith(f"got the type {kind}"), made.what
            continue
        if not made.usable:
            with pytest.raises(UserError, match="preferences"):
                PairReader(settings(folder), 0).round(0)
            continue
        reader = PairReader(settings(folder), 0)
        found = {
            number(p.row): (
                p.caption,
                int(p.media_0[0, 0, 0, 0]),
                int(p.media_1[0, 0, 0, 0]),
                p.label_0,
                p.source,
            )
            for p in reader.all()
        }
        assert found == made.usable, made.what
        assert {number(row) for row in reader.bad.found} == made.bad, made.what
        first = first_pair(settings(folder))
        assert first is not None and number(first.row) == min(made.usable), made.what


def test_what_the_tables_say_is_what_pyarrow_reads(tmp_path: Path) -> None:
    """The expectation itself, from pyarrow's own reading of plain columns."""
    for seed in (1, 2, 4, 5, 7, 8, 10, 11):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = made_tables.make(seed, folder)
        rows = pq.read_table(made.file, columns=["caption", "label_0", "label_1"]).to_pylist()
        for one, (caption, _, _, label_0, _) in made.usable.items():
            assert (rows[one]["caption"], float(rows[one]["label_0"])) == (caption, label_0)
            assert float(rows[one]["label_1"]) == 1.0 - label_0


@pytest.mark.parametrize("count", COUNTS)
def test_tasks_on_a_cluster_find_the_same_rows(tmp_path: Path, count: int) -> None:
    """What Ray Data's tasks run, called here: both readers agree on every row of every table that
    is not refused."""
    from rlalign.runtime.pairs import _decode, _item, _row

    for seed in range(1, count, 3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = made_tables.make(seed, folder)
        if not made.usable:
            continue
        reader = PairReader(settings(folder), 0)
        items = [_item(one.group, one.numbers) for one in reader._groups]
        batch = {name: [item[name] for item in items] for name in items[0]}
        found, bad = {}, {number(row) for row in reader.bad.found}
        for columns in _decode(batch, size=0, resize="squash"):
            for values in zip(*columns.values(), strict=True):
                packed = dict(zip(columns, values, strict=True))
                pair = _row(packed)
                if not isinstance(pair, Pair):
                    bad.add(number(pair.row))
                    continue
                found[number(pair.row)] = (
                    pair.caption,
                    int(pair.media_0[0, 0, 0, 0]),
                    int(pair.media_1[0, 0, 0, 0]),
                    pair.label_0,
                    pair.source,
                )
        assert (found, bad) == (made.usable, made.bad), made.what


@pytest.mark.parametrize("count", COUNTS)
def test_a_truncated_or_damaged_table_is_refused_in_one_message_or_read(
    tmp_path: Path, count: int
) -> None:
    for seed in range(0, count, 3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = made_tables.make(seed + 1, folder)
        rng, whole = (
            np.random.default_rng([1, seed]),
            np.frombuffer(made.file.read_bytes(), dtype=np.uint8),
        )
        footer = max(0, len(whole) - 1500)
        for first in (0, footer, None):
            damaged = whole[: rng.integers(len(whole))].copy() if first is None else whole.copy()
            if first is not None:
                damaged[rng.integers(first, len(whole), 3)] = rng.integers(0, 256, 3)
            made.file.write_bytes(damaged.tobytes())
            try:
                for pair in PairReader(settings(folder), 0).all():
                    assert pair.media_0.shape[:2] == (1, 3), made.what
            except UserError as error:
                message = str(error)
                assert "\n" not in message and (
                    "pairs.parquet" in message or str(folder) in message
                ), made.what


# one by one


def columns(count: int = 4, **changes: pa.Array) -> pa.Table:
    blob = encode(np.full((3, 2, 2), 9, dtype=np.uint8))
    plain = {
        "caption": pa.array(["a cat"] * count),
        "jpg_0": pa.array([blob] * count, pa.binary()),
        "jpg_1": pa.array([blob] * count, pa.binary()),
        "label_0": pa.array([1.0] * count),
        "label_1": pa.array([0.0] * count),
    }
    return pa.table({**plain, **changes})


def test_a_flag_in_whole_numbers_rules_rows_out(tmp_path: Path) -> None:
    pq.write_table(columns(has_label=pa.array([1, 0, None, 2], pa.int64())), tmp_path / "p.parquet")
    assert [number(p.row) for p in PairReader(settings(tmp_path), 0).all()] == [0, 2, 3]


def test_a_text_that_is_not_utf_8_is_a_bad_row_of_its_own(tmp_path: Path) -> None:
    broken = pa.array([b"a cat", b"a c\xe4t", None, "ein Kätzchen".encode()]).cast(
        pa.string(), safe=False
    )
    table = columns(caption=broken, model_0=broken)
    pq.write_table(table, tmp_path / "p.parquet")
    reader = PairReader(settings(tmp_path), 0)
    assert [(p.caption, p.source) for p in reader.all()] == [
        ("a cat", "a cat"),
        ("ein Kätzchen", "ein Kätzchen"),
    ]
    assert list(reader.bad.found.values()) == ["caption is not UTF-8 text", "caption is missing"]
    with pytest.raises(UserError, match=r"p\.parquet:1: caption is not UTF-8 text"):
        PairReader(settings(tmp_path, bad_share=0.0), 0)


def test_labels_that_are_no_number_are_named(tmp_path: Path) -> None:
    pq.write_table(columns(label_0=pa.array([float("nan"), 1.0, 1.0, 2.0])), tmp_path / "p.parquet")
    reader = PairReader(settings(tmp_path), 0)
    assert [number(row) for row in reader.bad.found] == [0, 3]
    assert "one of its labels is missing" in next(iter(reader.bad.found.values()))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("gone.png", "there is no such file"),
        ("https://example.org/a.png", "there is no such file"),
        (".", "it is no file"),
    ],
)
def test_a_picture_whose_file_is_not_there_is_named(tmp_path: Path, path: str, why: str) -> None:
    struct = pa.array([{"bytes": None, "path": path}] * 4, made_tables.IMAGE)
    pq.write_table(columns(jpg_1=struct), tmp_path / "p.parquet")
    message = refused(tmp_path, bad_share=0.0)
    assert (
        f"p.parquet:0: picture {str(tmp_path / path)!r} cannot be decoded ({why}) in jpg_1"
        in message
    )


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = columns()
    pq.write_table(table.append_column("caption", table["caption"]), tmp_path / "p.parquet")
    assert "has the column 'caption' 2 times; keep one" in refused(tmp_path)


def test_every_file_of_a_set_is_looked_at_and_they_may_differ_in_type(tmp_path: Path) -> None:
    row = {"caption": "a cat", "label_0": 1.0, "label_1": 0.0}
    row |= {name: encode(np.full((3, 2, 2), 9, dtype=np.uint8)) for name in ("jpg_0", "jpg_1")}
    write_pairs(tmp_path / "a.parquet", [row] * 3)
    pq.write_table(
        columns(label_0=pa.array([True] * 4), has_label=pa.array([True] * 4)),
        tmp_path / "b.parquet",
    )
    assert len(PairReader(settings(tmp_path), 0)) == 7
    pq.write_table(columns(jpg_0=pa.array(["eA=="] * 4)), tmp_path / "c.parquet")
    assert "c.parquet: column 'jpg_0' must hold the bytes of picture files" in refused(tmp_path)
