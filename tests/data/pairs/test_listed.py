"""Lists in JSON as they are published, and Pick-a-Pic's rows: which pairs they say, what is left
out and what is refused."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.cli import main
from rlalign.core.registry import UserError
from rlalign.data.pairs import listed
from rlalign.data.pairs.columns import open_pairs, write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader, PreferenceSettings, first_pair
from tests.runs import CONFIGS

Said = tuple[str, int, int, float]
"""Caption, the grey of each picture, label 0."""


def picture(folder: Path, grey: int) -> str:
    """A picture file of one grey, and its name."""
    folder.mkdir(exist_ok=True)
    name = f"{grey:05d}.png"
    (folder / name).write_bytes(encode(np.full((3, 8, 8), grey, dtype=np.uint8)))
    return name


def settings(path: Path, **changes: Any) -> PreferenceSettings:
    values = {"path": str(path), "pairs_per_round": 3, "pairs_per_pass": 2, "shuffle": 1, **changes}
    return PreferenceSettings.model_validate(values)


def said(path: Path, **changes: Any) -> list[Said]:
    return [
        (p.caption, int(p.media_0[0, 0, 0, 0]), int(p.media_1[0, 0, 0, 0]), p.label_0)
        for p in PairReader(settings(path, **changes), 0).all()
    ]


def write(file: Path, entries: list[Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(entries)
    if file.suffix == ".jsonl":
        text = "\n\n".join(json.dumps(entry) for entry in entries) + "\n"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("beside", ["", "train"])
@pytest.mark.parametrize("key", ["file_path", "image_path"])
def test_train_json_of_hpd(tmp_path: Path, key: str, beside: str) -> None:
    """The folder as it is unzipped: pictures beside the list, or in train/; its test.json is left
    aside. Both or neither preferred is a tie."""
    names = [picture(tmp_path / beside, grey) for grey in (10, 20, 30)]
    entries = [
        {"prompt": "a", key: names[:2], "human_preference": [1, 0], "user_hash": "x"},
        {"prompt": "b", key: names[1:], "human_preference": [0, 1]},
        {"prompt": "c", key: names[:2], "human_preference": [0, 0]},
    ]
    write(tmp_path / "train.json", entries)
    write(tmp_path / "test.json", [{"prompt": "d", "image_path": names, "rank": [1, 2, 3]}])
    assert said(tmp_path) == [("a", 10, 20, 1.0), ("b", 20, 30, 0.0)]
    assert said(tmp_path, ties="half")[2] == ("c", 10, 20, 0.5)
    reader = PairReader(settings(tmp_path), 0)
    assert reader.note == "1 ties are left out of 3 rows of pairs"
    assert reader.round(0)[0].row == f"{tmp_path / 'train.json'}:0"


def test_of_many_pictures_the_picked_one_is_compared_with_the_others(tmp_path: Path) -> None:
    names = [picture(tmp_path, grey) for grey in (10, 20, 30)]
    entry = {"prompt": "a", "file_path": names, "human_preference": [0, 1, 0]}
    assert said(write(tmp_path / "p.json", [entry])) == [("a", 10, 20, 0.0), ("a", 20, 30, 1.0)]


def test_test_json_of_hpd_is_all_pairs_of_its_ranks(tmp_path: Path) -> None:
    """Rank 1 is the best; equal ranks are a tie."""
    names = [picture(tmp_path / "test", grey) for grey in (10, 20, 30, 40)]
    entry = {"prompt": "a", "image_path": names, "rank": [2, 1, 2, 3], "raw_annotations": []}
    file = write(tmp_path / "test.json", [entry])
    found = [(10, 20, 0.0), (10, 30, 0.5), (10, 40, 1.0), (20, 30, 1.0), (20, 40, 1.0)]
    assert said(file, ties="half") == [("a", *one) for one in [*found, (30, 40, 1.0)]]
    assert len(said(file)) == 5


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("word", ["prompt", "caption"])
def test_pairs_of_chosen_and_rejected(tmp_path: Path, ending: str, word: str) -> None:
    """As a list and as an entry a line; relative paths are named from the list's folder."""
    names = [picture(tmp_path / "pictures", grey) for grey in (10, 20)]
    entries = [
        {word: "ein Käfer", "chosen": f"pictures/{names[1]}", "rejected": f"pictures/{names[0]}"},
        {word: "b", "chosen": str(tmp_path / "pictures" / names[0]), "rejected": names[1]},
    ]
    file = write(tmp_path / f"pairs.{ending}", entries)
    # the second has a picture that is not there
    assert said(file, bad_share=0.5) == [("ein Käfer", 20, 10, 1.0)]
    if ending == "jsonl":
        assert said(tmp_path, bad_share=0.5) == [("ein Käfer", 20, 10, 1.0)]


def test_a_long_list_is_dealt_out_as_a_parquet_file_is(tmp_path: Path) -> None:
    """Windows that cut through groups, two epochs, a resumed run; no picture is read before its
    round."""
    names = [picture(tmp_path, grey) for grey in (10, 20)]
    entries = [{"prompt": f"{n}", "chosen": names[0], "rejected": names[1]} for n in range(600)]
    write(tmp_path / "p.jsonl", entries)
    assert listed.sizes_of(tmp_path / "p.jsonl") == [256, 256, 88]
    one = PairReader(settings(tmp_path, pairs_per_round=100, shuffle=90), 0)
    seen = [[p.caption for p in one.round(n)] for n in range(12)]
    for epoch in (seen[:6], seen[6:]):
        assert sorted(chain.from_iterable(epoch)) == sorted(map(str, range(600)))
    resumed = PairReader(settings(tmp_path, pairs_per_round=100, shuffle=90), 0)
    assert [p.caption for p in resumed.round(7)] == seen[7]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).unlink()
    assert len(PairReader(settings(tmp_path), 0)) == 600
    with pytest.raises(UserError, match="can be decoded|bad_share"):
        PairReader(settings(tmp_path, bad_share=1.0), 0).round(0)


def test_a_list_that_has_changed_is_read_again(tmp_path: Path) -> None:
    names = [picture(tmp_path, grey) for grey in (10, 20)]
    entry = {"prompt": "a", "chosen": names[0], "rejected": names[1]}
    file = write(tmp_path / "p.json", [entry])
    assert len(said(file)) == 1
    write(file, [entry, entry])
    assert len(said(file)) == 2
    os.utime(file, ns=(1, 1))
    assert len(said(file)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a list of pairs, got a dict"),
        ("[", "must be JSON"),
        ("[1]", "entry 0 must be a mapping with prompt, chosen and rejected; prompt, file_path"),
        ('[{"prompt": "a"}]', "entry 0 must have prompt, chosen and rejected; prompt, file_path"),
        ('[{"chosen": "a", "rejected": "b"}]', "entry 0: the caption (prompt) must be text"),
        ('[{"prompt": "a", "chosen": 1, "rejected": "b"}]', "a picture's path must be text, got 1"),
        ('[{"prompt": "a", "file_path": "a", "rank": [1]}]', "in a list of paths, got 'a'"),
        ('[{"prompt": "a", "file_path": ["a", "b"], "rank": [1]}]', "got 2 and 1"),
        (
            '[{"prompt": "a", "file_path": ["a", "b"], "rank": "no"}]',
            "a list of numbers under rank",
        ),
        ('[{"prompt": "a", "file_path": ["a", "b"], "rank": [NaN, 1]}]', "must be JSON"),
        ('[{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}]', "half of a surrogate pair"),
        ("[]", "must hold at least one pair"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_another_list_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(text, encoding="utf-8")
    for read in (first_pair, lambda given: PairReader(given, 0)):
        with pytest.raises(UserError) as refused:
            read(settings(file))
        assert message in str(refused.value)
        assert str(refused.value).startswith(str(file))
        assert "\n" not in str(refused.value)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "a"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.jsonl must be JSON \(line 2: "):
        first_pair(settings(tmp_path))


ROWS: list[dict[str, Any]] = [
    {"label_0": 1.0, "label_1": 0.0, "has_label": True, "best_image_uid": "x"},
    {"label_0": 0.5, "label_1": 0.5, "has_label": True, "best_image_uid": "tie"},
    {"label_0": 0.0, "label_1": 1.0, "has_label": True, "best_image_uid": "y"},
    {"label_0": None, "label_1": None, "has_label": True, "best_image_uid": None},
    {"label_0": float("nan"), "label_1": float("nan"), "has_label": True, "best_image_uid": ""},
    {"label_0": 0.5, "label_1": 0.5, "has_label": False, "best_image_uid": ""},
    {"label_0": 1.0, "label_1": 0.0, "has_label": True, "are_different": False},
]
"""As Pick-a-Pic v2 has them: decided, tied, not labelled, and of one picture twice."""


def pickapic(file: Path) -> Path:
    rows = []
    for number, row in enumerate(ROWS):
        greys = {f"jpg_{i}": encode(np.full((3, 8, 8), number + 100 * i, np.uint8)) for i in (0, 1)}
        own = {"best_image_uid": "", "are_different": True, "image_0_uid": "x", "image_1_uid": "y"}
        rows.append({"caption": f"{number}", **greys, **own, **row})
    write_pairs(file, rows)
    return file


def test_rows_of_pick_a_pic_that_say_nothing_are_counted_and_left_out(tmp_path: Path) -> None:
    """The published trainer keeps the rows whose label_0 is 0 or 1; ours too, and none of them is
    bad."""
    file = pickapic(tmp_path / "p.parquet")
    reader = PairReader(settings(file, bad_share=0.0), 0)
    labels = [
        one
        for batch in open_pairs(file, ["label_0", "has_label", "are_different"])
        for one in batch.to_pylist()
    ]
    published = [str(n) for n, row in enumerate(labels) if row["label_0"] in (0, 1)]
    assert [p.caption for p in reader.all()] == [n for n in published if n != "6"] == ["0", "2"]
    assert reader.left_out == Counter(
        {"ties": 1, "without a label": 3, "with the same picture twice": 1}
    )
    assert reader.note == (
        "1 ties, 1 with the same picture twice, 3 without a label are left out of 7 rows of pairs"
    )
    assert len(PairReader(settings(file, bad_share=0.0, ties="half"), 0)) == 3
    assert first_pair(settings(file)).row == f"{file}:0"  # type: ignore[union-attr]


@pytest.mark.promise
@pytest.mark.usefixtures("without_report")
def test_check_and_a_run_say_once_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickapic(tmp_path / "p.parquet")
    given = f"preferences={{path: {tmp_path}, size: 32, pairs_per_round: 2, pairs_per_pass: 1}}"
    config = str(CONFIGS / "tiny_dpo_offline.yaml")
    assert main(["check", config, given]) == 0
    out = capsys.readouterr().out
    assert "2 pairs; 1 ties, 1 with the same picture twice, 3 without a label are left out" in out
    small = ["rounds=1", "evaluate.every=0", "evaluate.prompts=4", "plan.steps=2"]
    folder = tmp_path / "run"
    assert main(["train", config, given, *small, "--local", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("are left out of 7 rows of pairs") == 1
