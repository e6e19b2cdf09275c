"""Lists of prompts that are cut into shards: folders and globs, as data sets of a hub are laid
out."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlalign.core.locations import locate
from rlalign.core.prompts import record_of
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.data.prompts.base import Prompts

ROWS = [
    {"prompt": f"prompt {n}" if n % 5 else None, "tag": f"t{n % 3}", "n": n} for n in range(100)
]


def source(path: Path | str, **settings: Any) -> Prompts:
    found = build("prompts", {"name": "file", "path": str(path), **settings})
    assert isinstance(found, Prompts)
    return found


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **settings).pool()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(file: Path, rows: Sequence[dict], row_group_size: int = 7) -> Path:
    """A shard in the form of its ending."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_shards(folder: Path, ending: str) -> Path:
    """The rows in three shards, the second of which is one row without a prompt."""
    for i, rows in enumerate((ROWS[:50], ROWS[50:51], ROWS[51:])):
        write(folder / "data" / f"train-{i:05d}-of-00003.{ending}", rows)
    return folder


def said(prompts: Sequence[str]) -> list[tuple[str, dict]]:
    return [(str(prompt), dict(record_of(prompt))) for prompt in prompts]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "ndjson"])
def test_a_folder_of_shards_is_one_list(tmp_path: Path, ending: str) -> None:
    """A round, a walk, what is held out and single prompts are as from one file of all rows."""
    folder = write_shards(tmp_path / "set", ending)
    (folder / "README.md").write_text("what it is")
    write(folder / ".cache" / f"train.{ending}", ROWS[:3])
    one = write(tmp_path / f"one.{ending}", ROWS)
    settings = {"per_round": 40, "per_unit": 4, "samples_per_prompt": 2}
    for more in ({}, {"held_out_share": 0.3}):
        shards, whole = source(folder, **settings, **more), source(one, **settings, **more)
        assert shards.units(0, 1, Plan()) == whole.units(0, 1, Plan())
        drawn = [prompt for _, prompt in shards.draw(3, 2)]
        assert said(drawn) == said([prompt for _, prompt in whole.draw(3, 2)])
        assert said(list(shards.pool())) == said(list(whole.pool()))
        assert shards.held_out(9) == whole.held_out(9)
    pool = source(folder).pool()
    assert len(pool) == 80
    assert record_of(pool[-1])["n"] == 99
    assert "prompt 51" in pool


def test_a_glob_names_the_shards_of_a_split(tmp_path: Path, monkeypatch) -> None:
    write_shards(tmp_path, "parquet")
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [{"prompt": "a bird"}])
    found = source(
        tmp_path / "data" / "train-*", held_out_path=str(tmp_path / "data" / "test-*.parquet")
    )
    assert len(found.pool()) == 80
    assert list(found.held_out_pool() or ()) == ["a bird"]
    assert found.find_overlap() is None
    monkeypatch.chdir(tmp_path / "data")
    near = locate(source("train-*"), "prompts")
    assert str(getattr(near, "path", "")) == str(tmp_path / "data" / "train-*")
    assert len(near.pool()) == 80


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("train/0000", "validation/0000"),
        ("train", "eval"),
    ],
)
def test_a_folder_of_two_splits_is_refused_with_a_glob_of_one(tmp_path: Path, names) -> None:
    for name in names:
        write(tmp_path / f"{name}.parquet", [{"prompt": name}])
    message = refused(tmp_path)
    assert message.startswith("prompts.path must name the shards of one split, got ")
    pattern = message.rpartition("such as ")[2].strip("'")
    assert list(source(pattern).pool()) == [names[0]]


def test_a_bad_shard_is_named_with_its_row(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "p", "parquet")
    bad = folder / "data" / "train-00002-of-00003.parquet"
    texts = pa.array([b"prompt"] * 30 + [b"\xff"] * 3, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), bad, row_group_size=10)
    assert f"{str(bad)!r} is damaged, or its text is not UTF-8, from row 31 on" in refused(folder)
    write(bad, [{"caption": "of another column"}])
    message = refused(folder)
    assert f"prompts.column must be a column of {str(bad)!r}, got 'prompt'" in message
    bad.write_bytes(b"PAR1")
    assert f"must be a readable Parquet file, got {str(bad)!r}" in refused(folder)

    folder = write_shards(tmp_path / "j", "jsonl")
    bad = folder / "data" / "train-00001-of-00003.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert f"{str(bad)!r}, whose line 2 has a int as its prompt" in refused(folder)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    assert "where there is none" in refused(tmp_path)
    assert "where there is none" in refused(tmp_path / "*.parquet")
    write(tmp_path / "a.parquet", [{"prompt": ""}])
    write(tmp_path / "b.parquet", [{"prompt": None, "n": 1}, {"prompt": " ", "n": 2}])
    assert "must hold at least one prompt" in refused(tmp_path)


def test_a_shard_more_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", [{"prompt": "a cat"}])
    assert list(source(tmp_path).pool()) == ["a cat"]
    write(tmp_path / "1.parquet", [{"prompt": "a dog"}])
    assert list(source(tmp_path).pool()) == ["a cat", "a dog"]


def test_shards_are_not_in_memory(tmp_path: Path) -> None:
    """60,000 prompts in three shards: 8 bytes of each are kept, and as many for a round's order."""
    count = 60_000
    rows = [{"prompt": f"prompt {n} " + "of a long list " * 9, "n": n} for n in range(count)]
    for i in range(3):
        write(tmp_path / f"{i}.parquet", rows[i::3], row_group_size=2000)
    found = source(tmp_path, per_round=8, per_unit=8)
    tracemalloc.start()
    try:
        units = found.units(0, 1, Plan())
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(units[0].prompts) == 32
    assert kept < 8 * count + 2**20
    assert peak < 24 * count + 2**22
