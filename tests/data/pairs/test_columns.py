"""Parquet files of pairs: what is written comes back, whole or not at all, and what is no such file
is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import (
    OPTIONAL,
    REQUIRED,
    group_rows,
    open_pairs,
    pair_files,
    pair_schema,
    write_pairs,
)


def row(number: int, **more: object) -> dict[str, object]:
    return {
        "caption": f"a picture of {number}",
        "jpg_0": bytes([number]),
        "jpg_1": bytes([number, number]),
        "label_0": (1.0, 0.0, 0.5)[number % 3],
        "label_1": (0.0, 1.0, 0.5)[number % 3],
        **more,
    }


def test_rows_come_back_as_they_were_in_batches_of_one_row_group(tmp_path: Path) -> None:
    rows = [row(n, has_label=True, ranking_id=n, image_0_uid=f"left {n}") for n in range(10)]
    file = tmp_path / "deep" / "pairs.parquet"
    assert write_pairs(file, iter(rows), rows_per_group=4) == 10
    assert group_rows(file) == [4, 4, 2]
    columns = (*REQUIRED, "has_label", "ranking_id", "image_0_uid")
    batches = list(open_pairs(file, columns, batch=3))
    assert max(batch.num_rows for batch in batches) <= 3
    assert [r for batch in batches for r in batch.to_pylist()] == rows
    second = [r["caption"] for batch in open_pairs(file, groups=[1]) for r in batch.to_pylist()]
    assert second == [f"a picture of {n}" for n in range(4, 8)]


def test_the_types_are_those_of_pick_a_pic(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [row(0, has_label=True, are_different=True)])
    schema = pq.read_schema(file)
    assert schema.names == [*REQUIRED, "are_different", "has_label"]
    assert (
        schema.field("jpg_0").type == pa.binary() and schema.field("label_0").type == pa.float64()
    )
    assert pair_schema().names == [*REQUIRED, *OPTIONAL]


def test_a_file_with_more_columns_is_read_and_the_others_stay_unread(tmp_path: Path) -> None:
    file = tmp_path / "foreign.parquet"
    pq.write_table(pa.Table.from_pylist([row(0, image_0_url="https://example.org/0.png")]), file)
    (batch,) = open_pairs(file, (*REQUIRED, "has_label"))
    assert batch.schema.names == [*REQUIRED]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [row(0)])
    before = file.read_bytes()

    def broken():
        yield from (row(n % 250) for n in range(600))
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_pairs(file, broken())
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.parquet"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no pair to write"),
        ([{k: v for k, v in row(0).items() if k != "jpg_1"}], "the first row lacks 'jpg_1'"),
        ([row(0, haslabel=True)], "the first row has 'haslabel'; did you mean 'has_label'?"),
        ([row(0), row(1, has_label=True)], "row 1 must have the columns caption"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        write_pairs(tmp_path / "pairs.parquet", rows)
    assert list(tmp_path.iterdir()) == []


def test_a_file_a_folder_and_a_glob_name_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        write_pairs(tmp_path / f"{name}.parquet", [row(0)])
    (tmp_path / "notes.txt").write_text("not pairs")
    expected = [tmp_path / f"{name}.parquet" for name in ("a", "b", "deep/c")]
    assert pair_files(str(tmp_path)) == expected
    assert pair_files(str(tmp_path / "*.parquet")) == expected[:2]
    assert pair_files(str(expected[1])) == [expected[1]]
    for nothing in (str(tmp_path / "nothing*"), str(tmp_path / "**x"), ""):
        with pytest.raises(
            UserError,
            match=r"preferences\.path must name a file of pairs .* got '.*', where there is none",
        ):
            pair_files(nothing)


def test_a_glob_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "deep" / "a.parquet", [row(0)])
    monkeypatch.chdir(tmp_path)
    assert pair_files("**/*.parquet") == pair_files("deep/a.parquet") == [Path("deep/a.parquet")]


def test_what_is_no_file_of_pairs_is_named(tmp_path: Path) -> None:
    text, other = tmp_path / "text.parquet", tmp_path / "other.parquet"
    text.write_text("caption,jpg_0\n")
    pq.write_table(pa.table({"captions": ["a"], "jpg_0": [b""]}), other)
    with pytest.raises(
        UserError, match=r"text\.parquet must be a Parquet file of preference pairs"
    ):
        group_rows(text)
    with pytest.raises(
        UserError, match=r"other\.parquet must have .* lacks 'caption'; did you mean 'captions'\?"
    ):
        list(open_pairs(other))
