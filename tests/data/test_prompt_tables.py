"""Files of prompts that are tables: the shapes in which they are published, and long ones."""

from __future__ import annotations

import csv
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlalign.core.prompts import record_of
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.data.prompts import _lines
from rlalign.data.prompts.base import Prompts, prompt_id
from rlalign.data.prompts.file import read_prompts

GENEVAL = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cow", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "prompt": "a photo of a red cow left of a dog",
    },
]


def source(path, **settings) -> Prompts:
    return made({"name": "file", "path": str(path), **settings})


def made(settings: dict) -> Prompts:
    found = build("prompts", settings)
    assert isinstance(found, Prompts)
    return found


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, **settings) -> list[tuple[str, dict]]:
    return [(str(p), dict(record_of(p))) for p in source(path, **settings).pool()]


def refused(path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        source(path, **settings).pool()
    message = str(caught.value)
    assert "\n" not in message
    return message


def without(row: dict, name: str) -> dict:
    return {n: value for n, value in row.items() if n != name}


# published shapes


def test_genevals_metadata_is_read_as_it_is_published(tmp_path):
    path = write_lines(tmp_path / "evaluation_metadata.jsonl", GENEVAL)
    assert read(path) == [(row["prompt"], without(row, "prompt")) for row in GENEVAL]
    assert read(path, record=["tag"])[1] == ("a photo of two clocks", {"tag": "counting"})
    assert read(path, record=[])[1] == ("a photo of two clocks", {})


@pytest.mark.parametrize("as_text", [False, True])
def test_a_metadata_column_is_the_record_itself(tmp_path, as_text):
    """As an object, and as the string of one."""
    rows = [{"prompt": row["prompt"], "metadata": row} for row in GENEVAL]
    rows = [{**r, "metadata": json.dumps(r["metadata"])} for r in rows] if as_text else rows
    assert read(write_lines(tmp_path / "p.jsonl", rows)) == [
        (row["prompt"], row) for row in GENEVAL
    ]
    # the last one's position is a list of a word and a number, which is no type of Arrow's
    rows = rows if as_text else rows[:2]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [(row["prompt"], row) for row in GENEVAL[: len(rows)]]


def test_metadata_that_is_no_object_is_a_field_like_others(tmp_path):
    rows = [{"text": "a cat", "metadata": "{by hand}", "n": 1}]
    assert read(write_lines(tmp_path / "p.jsonl", rows)) == [
        ("a cat", {"metadata": "{by hand}", "n": 1})
    ]


def test_a_parquet_of_captions_and_pictures_is_read_without_its_pictures(tmp_path):
    """Pick-a-Pic's columns, of which the pictures are bytes."""
    table = pa.table(
        {
            "are_different": [True, False],
            "caption": ["a cat", "a dog"],
            "created_at": pa.array([0, 1], pa.timestamp("ns")),
            "jpg_0": [b"\xff\xd8", b"\xff\xd8"],
            "label_0": [1.0, float("nan")],
            "ranking_id": [7, None],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [
        ("a cat", {"are_different": True, "label_0": 1.0, "ranking_id": 7}),
        ("a dog", {"are_different": False}),
    ]
    assert "prompts.record must name columns of text" in refused(
        tmp_path / "p.parquet", record=["jpg_0"]
    )


@pytest.mark.parametrize(("name", "separator"), [("d.csv", ","), ("d.csv", ";"), ("d.tsv", "\t")])
def test_drawbenchs_csv_and_partipromptss_tsv_are_read(tmp_path, name, separator):
    path = tmp_path / name
    rows = [
        ["A red colored car.", "Colors"],
        ["A sign that says 'Hello, World';\tnow", "Text"],
        ["one line\nand another", 'of "two"'],
        ["", "no prompt"],
    ]
    with path.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened, delimiter=separator).writerows([["Prompts", "Category"], *rows])
    assert read(path) == [(text, {"Category": kind}) for text, kind in rows[:3]]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path)[0] == (rows[0][0], {"Category": "Colors"})


def test_text_with_quotes_is_text(tmp_path):
    """Flow-GRPO's OCR prompts: the words to draw stand in quotes."""
    lines = [
        'A sign that says "Hello, World"',
        '"OPEN", says a neon sign, prompt',
        "A label, text on it: “Grün”",
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "train.txt") == [(line, {}) for line in lines]


def test_a_table_is_known_by_its_content_too(tmp_path):
    mark = "\ufeff"
    path = tmp_path / "p.txt"
    for content, record in [
        ('{"prompt": "a cat", "n": 1}\n\n{"prompt": "a dog", "n": 2}\n', {"n": 1}),
        (mark + '{"prompt": "a cat"}\r\n{"prompt": "a dog"}\r\n', {}),
        ('prompt,id\n"a cat",1\na dog,2\n', {"id": "1"}),
        (",Prompt\n0,a cat\n1,a dog\n", {"": "0"}),
        ("caption;id\na cat;1\na dog;2", {"id": "1"}),
        ("Prompt\tCategory\tNote\na cat\tAnimals\t\na dog\t\t\n", {"Category": "Animals"}),
    ]:
        path.write_text(content, encoding="utf-8", newline="")
        assert read(path)[0] == ("a cat", record)
        assert [text for text, _ in read(path)] == ["a cat", "a dog"]
    pq.write_table(pa.table({"text": ["a cat"]}), path)
    assert read(path) == [("a cat", {})]


def test_the_column_may_be_named(tmp_path):
    rows = [{"prompt": "short", "long": "a long one", "n": 1}]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert read(path, column="long") == [("a long one", {"prompt": "short", "n": 1})]
    assert "prompts.column must be a column of" in refused(path, column="lang")
    assert "did you mean 'long'?" in refused(path, column="lang")
    assert "prompts.record must name columns of" in refused(path, record=["m"])
    pq.write_table(pa.table({"n": [1], "x": ["a"]}), tmp_path / "p.parquet")
    message = refused(tmp_path / "p.parquet")
    assert message.startswith("prompts.column must name the column of prompts of ")
    assert message.endswith("its columns: n, x")
    assert "must name a column of text" in refused(tmp_path / "p.parquet", column="n")
    (tmp_path / "p.csv").write_text("a cat\na dog\n")
    assert "its columns: a cat" in refused(tmp_path / "p.csv")


# rows that are none


def test_json_lines_may_be_strings_and_empty_ones_are_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"a cat"\n\n" "\n{"prompt": null}\n{"prompt": " a dog ", "n": [1]}\n')
    assert read(path, column="prompt") == [("a cat", {}), ("a dog", {"n": [1]})]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{'prompt': 'a cat'}", "line 3 is no JSON"),
        ('["a cat"]', "line 3 is a list"),
        ('{"prompt": 3}', "line 3 has a int as its prompt"),
        ('{"caption": "a cat"}', "line 3 has no 'prompt'"),
        ('{"prompt": "half \\\\ud83d"}'.replace("\\\\", "\\"), "line 3 is no JSON"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_a_bad_line_is_named_before_anything_is_drawn(tmp_path, monkeypatch, line, why, large):
    monkeypatch.setattr(_lines, "LARGE", 0 if large else 2**22)
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n{{"prompt": "b"}}\n')
    assert why in refused(path)


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a cat", "n": NaN, "m": [1.5, -Infinity]}\n')
    assert read(path) == [("a cat", {"n": None, "m": [1.5, None]})]


def test_a_row_of_csv_of_another_length_is_named(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,n\n"a\ncat",1\na dog, asleep,2\n')
    assert "whose row at line 4 is none (it has 3 cells and the first 2)" in refused(
        tmp_path / "p.csv"
    )


def test_rows_of_parquet_without_a_prompt_are_skipped_in_every_group(tmp_path):
    texts = [None, "a", " ", "b", "c", None, "d"]
    table = pa.table({"prompt": texts, "n": list(range(7))})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    pool = source(tmp_path / "p.parquet").pool()
    assert [(str(p), record_of(p)["n"]) for p in pool] == [("a", 1), ("b", 3), ("c", 4), ("d", 6)]
    assert [record_of(pool[i])["n"] for i in (-1, 0, 2)] == [6, 1, 4]
    assert pool[1:3] == ["b", "c"]
    with pytest.raises(IndexError):
        pool[4]


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1....")
    assert "prompts.path must be a readable Parquet file" in refused(path)
    array = pa.array([b"a cat", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": array}), path)
    assert "is damaged, or its text is not UTF-8" in refused(path)


# every form alike


FORMS = ("p.txt", "p.jsonl", "p.csv", "p.parquet")


def write(path, texts):
    """The same prompts in the form that the name says; all but text with a number in the record."""
    rows = [{"prompt": text, "n": str(n)} for n, text in enumerate(texts)]
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        write_lines(path, rows)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, ["prompt", "n"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    return path


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("large", [False, True])
def test_a_round_is_the_same_from_every_form_of_file(tmp_path, monkeypatch, name, large):
    """And as from a list: a round's texts depend on (seed, round) and the texts alone."""
    monkeypatch.setattr(_lines, "LARGE", 0 if large else 2**22)
    texts = [f"{'größer ' if n % 7 == 0 else ''}prompt {n}" for n in range(5000)]
    path = write(tmp_path / name, texts)
    settings = {"per_round": 40, "per_unit": 4, "samples_per_prompt": 2}
    found = source(path, **settings)
    listed = made({"name": "list", "prompts": texts, **settings})
    for round in (1, 2):
        drawn = found.draw(3, round)
        assert [t for _, t in drawn] == [t for _, t in listed.draw(3, round)]
        if name != "p.txt":
            assert all(text.endswith(f" {record_of(text)['n']}") for _, text in drawn)
    assert list(found.pool()) == texts
    assert len(found.pool()) == 5000
    assert "prompt 4999" in found.pool()


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\n")
    assert len(source(path).pool()) == 2
    path.write_text("a cat\na dog\na bird\n")
    assert source(path).pool()[2] == "a bird"


# ids


def test_a_record_is_part_of_a_prompts_id(tmp_path):
    rows = [{"prompt": "a cat", "n": 1, "m": 2}, {"prompt": "a cat", "n": 2}, {"prompt": "a cat"}]
    pool = source(write_lines(tmp_path / "p.jsonl", rows), per_round=3, per_unit=3)
    ids = [number for number, _ in pool.held_out(3)]
    assert len(set(ids)) == 3
    assert ids[2] == prompt_id("a cat"), "plain text keeps its id"
    turned = write_lines(tmp_path / "q.jsonl", [{"m": 2, "n": 1, "prompt": "a cat"}])
    assert source(turned).held_out(1)[0][0] == ids[0], "the order of fields says nothing"
    [unit] = pool.units(0, 1, Plan())
    taken = unit.take([0, 5, 11])
    assert [record_of(p) for p in taken.prompts] == [record_of(unit.prompts[i]) for i in (0, 5, 11)]


# held out


def test_a_share_is_held_out_by_the_text_alone(tmp_path):
    """Of 4,000 texts a tenth, within 4.5 standard deviations."""
    texts = [f"prompt {n}" for n in range(4000)]
    path = write(tmp_path / "p.txt", [*texts, *texts])
    found = source(path, held_out_share=0.1)
    held = found.held_out_pool()
    assert held is not None
    assert set(held) | set(found.pool()) == set(texts)
    assert not set(held) & set(found.pool()), "equal texts are on one side"
    assert abs(len(held) / 2 - 400) < 4.5 * (4000 * 0.1 * 0.9) ** 0.5
    assert [t for _, t in found.held_out(9)] == held[:9]
    assert found.find_overlap() is None
    other = source(write(tmp_path / "p.parquet", texts), held_out_share=0.1)
    assert set(other.held_out_pool() or ()) == set(held), "in every file"


def test_a_share_and_a_file_are_not_both_held_out(tmp_path):
    path = write(tmp_path / "p.txt", ["a", "b"])
    with pytest.raises(UserError, match=r"^prompts\.held_out_share must be 0 with held_out_path"):
        source(path, held_out_share=0.1, held_out_path=str(path))
    with pytest.raises(UserError, match=r"must leave a prompt for evaluation, got 1e-09 of 2"):
        source(path, held_out_share=1e-9).held_out(1)


@pytest.mark.parametrize("name", FORMS)
def test_prompts_on_both_sides_are_found(tmp_path, name):
    train = write(tmp_path / name, [f"prompt {n}" for n in range(9000)])
    held = write(tmp_path / "held.txt", ["a bird", "prompt 8999", "prompt 2", "prompt 2"])
    found = source(train, held_out_path=str(held)).find_overlap()
    assert str(found) == ("2 of 3 held-out prompts are trained on as well, such as 'prompt 2'")
    apart = write(tmp_path / "apart.txt", ["a bird"])
    assert source(train, held_out_path=str(apart)).find_overlap() is None
    assert source(train).find_overlap() is None, "evaluation takes the pool's own"


def test_a_list_tells_of_prompts_on_both_sides():
    listed = made({"name": "list", "prompts": ["a", "b"], "held_out_prompts": ["b"]})
    assert str(listed.find_overlap()).startswith("1 of 1 held-out prompts")


# long files


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_long_file_is_not_in_memory(tmp_path, name):
    """100,000 prompts of some 150 bytes: 16 bytes of each are kept, and 8 for the permutation."""
    count = 100_000
    path = write(tmp_path / name, [f"prompt {n} " + "of a long list " * 9 for n in range(count)])
    found = source(path, per_round=8, per_unit=8)
    import pyarrow.json  # noqa: F401 - its own memory is none of a file's

    tracemalloc.start()
    try:
        units = found.units(0, 1, Plan())
        found.held_out(64)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(units[0].prompts) == 32
    assert kept < 16 * count + 2**20
    assert peak < 48 * count + 5 * _lines._PIECE


def test_parquet_is_read_in_batches_of_the_columns_that_are_wanted(tmp_path, monkeypatch):
    """No more than a batch of rows becomes Python's at once, and pictures never do."""
    from rlalign.data.prompts._parquet import ParquetRows

    count = 20_000
    table = pa.table(
        {
            "prompt": [f"prompt {n}" for n in range(count)],
            "n": list(range(count)),
            "jpg": pa.array([b"\0" * 50] * count),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    made: list[int] = []
    real = ParquetRows._prompts

    def counted(self, batch, rows):
        assert batch.schema.names == ["prompt", "n"]
        made.append(len(rows))
        return real(self, batch, rows)

    monkeypatch.setattr(ParquetRows, "_prompts", counted)
    pool = read_prompts(str(tmp_path / "p.parquet"), "prompts.path")
    wanted = [19_999, 3, 5000, 3]
    assert [record_of(p)["n"] for p in pool.take(wanted)] == wanted
    assert sum(made) == 3
    assert sum(1 for _ in pool) == count
    assert max(made) <= 4096
    assert isinstance(pool, ParquetRows)
    assert pool._rows.dtype == np.int64


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet", "shards"])
def test_a_million_prompts_take_less_than_300_mb_more_than_ten(tmp_path, form):
    """The largest resident set of a process that draws, holds out and compares."""
    from benchmarks.long_prompts import measure_all

    found = measure_all(1_000_000, tmp_path, (form,))
    assert found[form]["memory_of_all"] < 300
