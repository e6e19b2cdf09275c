"""Preference pairs: the order is keyed and independent of workers and files' sizes, bad rows are
counted and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode, pairs_of
from rlalign.data.pairs.reader import PairReader, PreferenceSettings, decode
from tests import toy


def picture(number: int) -> np.ndarray:
    """(3, 8, 8) uint8 that says its number."""
    return np.full((3, 8, 8), number, dtype=np.uint8)


def row(number: int, label_0: float | None = 1.0, **changes: object) -> dict[str, object]:
    label_1 = None if label_0 is None else 1.0 - label_0
    found = {
        "caption": f"prompt {number % 5}",
        "label_0": label_0,
        "label_1": label_1,
        "has_label": True,
    }
    return {
        **found,
        "jpg_0": encode(picture(number)),
        "jpg_1": encode(picture(number + 100)),
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """37 pairs in three files of several row groups."""
    for name, first, last in (("a", 0, 20), ("b", 20, 23), ("c", 23, 37)):
        write_pairs(
            tmp_path / f"{name}.parquet", [row(n) for n in range(first, last)], rows_per_group=6
        )
    return tmp_path


def settings(path: Path, **changes: object) -> PreferenceSettings:
    values = {"path": str(path), "pairs_per_round": 5, "pairs_per_pass": 2, "shuffle": 8, **changes}
    return PreferenceSettings.model_validate(values)


def numbers(reader: PairReader, *rounds: int) -> list[int]:
    """The numbers that the pictures of these rounds say."""
    return [int(pair.media_0[0, 0, 0, 0]) for r in rounds for pair in reader.round(r)]


def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own(folder: Path) -> None:
    reader = PairReader(settings(folder), seed=0)
    assert len(reader) == 37
    seen = numbers(reader, *range(15))  # 75 places: two epochs and one more
    assert sorted(seen[:37]) == sorted(seen[37:74]) == list(range(37))
    assert seen[:37] != list(range(37)) and seen[:37] != seen[37:74]
    pair = reader.round(0)[0]
    assert pair.media_1.dtype == np.uint8 and (pair.media_1 == picture(seen[0] + 100)).all()
    assert pair.caption == f"prompt {seen[0] % 5}" and pair.label_0 == 1.0


def test_a_round_is_a_function_of_seed_and_number_alone(folder: Path) -> None:
    whole = [numbers(PairReader(settings(folder), seed=0), r) for r in range(12)]
    walked = PairReader(settings(folder), seed=0)
    assert [numbers(walked, r) for r in range(12)] == whole
    assert numbers(PairReader(settings(folder), seed=0), 11) == whole[11], (
        "a resumed run reads what it would have read"
    )
    assert [numbers(walked, r) for r in (3, 9, 1)] == [whole[3], whole[9], whole[1]]
    assert [numbers(PairReader(settings(folder), seed=1), r) for r in range(12)] != whole


def test_the_order_depends_on_neither_threads_nor_passes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, alone = PairReader(settings(folder), 0), PairReader(settings(folder), 0)
    rows = [[pair.row for pair in plain.round(r)] for r in range(9)]
    assert [[p.row for part in plain.passes(r) for p in part] for r in range(9)] == rows
    assert [len(part) for part in plain.passes(0)] == [2, 2, 1]
    monkeypatch.setattr("rlalign.data.pairs.reader._MOST_THREADS", 1)
    assert [[pair.row for pair in alone.round(r)] for r in range(9)] == rows


@pytest.mark.parametrize("shuffle", [1, 3, 1000])
def test_a_window_may_be_smaller_or_larger_than_a_row_group(folder: Path, shuffle: int) -> None:
    seen = numbers(PairReader(settings(folder, shuffle=shuffle), 0), *range(8))
    assert sorted(seen[:37]) == list(range(37))


def test_captions_can_be_chosen_and_are_counted(folder: Path) -> None:
    reader = PairReader(
        settings(folder), 0, keep=lambda caption: caption in ("prompt 1", "prompt 4")
    )
    assert reader.counts == Counter({"prompt 1": 8, "prompt 4": 7})
    assert {pair.caption for pair in reader.all()} == {"prompt 1", "prompt 4"}
    with pytest.raises(
        UserError, match="at least one usable pair, got none of the captions asked for"
    ):
        PairReader(settings(folder), 0, keep=lambda caption: False)


def test_a_caption_that_is_rare_among_many_rows_is_found(tmp_path: Path) -> None:
    captions = ["rare" if n in (150, 299) else "common" for n in range(300)]
    rows = [row(n % 100, caption=caption) for n, caption in enumerate(captions)]
    write_pairs(tmp_path / "p.parquet", rows, rows_per_group=300)
    reader = PairReader(settings(tmp_path), 0, keep=lambda caption: caption == "rare")
    assert [pair.row for pair in reader.all()] == [
        f"{tmp_path}/p.parquet:150",
        f"{tmp_path}/p.parquet:299",
    ]
    assert sorted({pair.row for pair in reader.round(0)}) == [pair.row for pair in reader.all()]


def test_ties_are_dropped_or_kept_as_halves(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", [row(n, (1.0, 0.0, 0.5)[n % 3]) for n in range(9)])
    assert {p.label_0 for p in PairReader(settings(tmp_path), 0).all()} == {0.0, 1.0}
    kept = PairReader(settings(tmp_path, ties="half"), 0)
    assert len(kept) == 9 and Counter(p.label_0 for p in kept.all()) == {0.0: 3, 0.5: 3, 1.0: 3}


def test_rows_that_the_set_itself_rules_out_are_not_bad(tmp_path: Path) -> None:
    rows = [row(0), row(1, None, has_label=False), row(2), row(3)]
    write_pairs(
        tmp_path / "p.parquet", [{**r, "are_different": n != 2} for n, r in enumerate(rows)]
    )
    reader = PairReader(settings(tmp_path, bad_share=0.0), 0)
    assert [p.row.rsplit(":", 1)[1] for p in reader.all()] == ["0", "3"]


BAD = {
    3: {"caption": None},
    5: {"caption": "  "},
    8: {"label_0": None, "label_1": 1.0},
    11: {"label_0": 0.7, "label_1": 0.3},
    12: {"label_0": 1.0, "label_1": 1.0},
}
BAD_PICTURES = {
    14: {"jpg_0": b"no picture"},
    17: {"jpg_1": None},
    19: {"jpg_1": encode(picture(1))[:40]},
}


def test_bad_rows_are_counted_and_skipped_up_to_the_stated_share(tmp_path: Path) -> None:
    rows = [row(n, **{**BAD, **BAD_PICTURES}.get(n, {})) for n in range(20)]
    write_pairs(tmp_path / "p.parquet", rows, rows_per_group=7)
    reader = PairReader(settings(tmp_path, bad_share=0.4), 0)
    assert sorted(int(name.rsplit(":", 1)[1]) for name in reader.bad.found) == sorted(BAD)
    seen = numbers(reader, 0, 1, 2)
    assert len(seen) == 15 and set(seen) <= set(range(20)) - set(BAD) - set(BAD_PICTURES)
    assert set(seen) == {p.media_0[0, 0, 0, 0] for p in reader.all()}, (
        "another pair stands in an undecodable one's place"
    )
    assert {int(name.rsplit(":", 1)[1]) for name in reader.bad.found} == set(BAD) | set(
        BAD_PICTURES
    )
    again = PairReader(settings(tmp_path, bad_share=0.4), 0)
    assert numbers(again, 2, 1, 0) == [*seen[10:], *seen[5:10], *seen[:5]]


def test_too_many_bad_rows_are_refused_with_their_file_and_numbers(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    write_pairs(file, [row(n, **BAD.get(n, {})) for n in range(20)], rows_per_group=7)
    with pytest.raises(UserError) as refused:
        PairReader(settings(tmp_path, bad_share=0.1), 0)
    message = str(refused.value)
    assert message.startswith(
        "preferences.bad_share must be >= the share of bad rows, got 0.1 with at least 3 bad of 20"
        " rows"
    )
    for part in (
        f"{file}:3: caption is missing",
        f"{file}:5: caption is missing",
        f"{file}:8: one of its labels is missing",
    ):
        assert part in message
    write_pairs(file, [row(n, **BAD_PICTURES.get(n, {})) for n in range(20)], rows_per_group=7)
    with pytest.raises(UserError, match=r"p\.parquet:14: picture cannot be decoded"):
        list(PairReader(settings(tmp_path, bad_share=0.0), 0).all())


def test_png_is_lossless_jpeg_is_near_and_both_are_resized() -> None:
    ramp = np.linspace(0, 255, 3 * 16 * 16).reshape(3, 16, 16).astype(np.uint8)
    assert (decode(encode(ramp)) == ramp).all()
    assert np.abs(decode(encode(ramp, "jpeg")).astype(int) - ramp).mean() < 6
    assert decode(encode(ramp), 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    "wrong", [{"pairs_per_pass": 6}, {"ties": "no"}, {"bad_share": 1.5}, {"pth": "x"}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValidationError):
        settings(tmp_path, **wrong)


@pytest.mark.parametrize("every", ["best_and_worst", "all"])
def test_pairs_of_a_rounds_samples_say_who_scored_more(tmp_path: Path, every: str) -> None:
    units = toy.make_units(2, per_unit=8)  # two samples of each of four prompts per unit
    scored = toy.collect(toy.ToyPolicy(), units)
    scored[0].total_B[4] = scored[0].total_B[0]  # a tie of the first prompt's first two samples
    rows = list(pairs_of(scored, every))
    assert len(rows) == (4 if every == "best_and_worst" else 4 * 6)
    total = {
        f"{s.unit.key}/{p}/{k}": (float(t), m)
        for s in scored
        for p, k, t, m in zip(
            s.unit.prompt_ids, s.unit.sample_ids, s.total_B, s.media_BFCHW, strict=True
        )
    }
    for one in rows:
        (score_0, media_0), (score_1, media_1) = (
            total[one["image_0_uid"]],
            total[one["image_1_uid"]],
        )
        assert one["label_0"] == (0.5 if score_0 == score_1 else float(score_0 > score_1))
        assert one["label_0"] + one["label_1"] == 1.0
        assert (decode(one["jpg_0"]) == media_0).all() and (decode(one["jpg_1"]) == media_1).all()
        if every == "best_and_worst":
            group = [
                t for uid, (t, _) in total.items() if uid.split("/")[3] == str(one["ranking_id"])
            ]
            assert {score_0, score_1} == {min(group), max(group)}
    assert any(one["label_0"] == 0.5 for one in rows) == (every == "all")
    write_pairs(tmp_path / "made.parquet", rows)
    assert len(PairReader(settings(tmp_path, ties="half"), 0)) == len(rows)


def test_samples_without_a_score_take_no_part() -> None:
    scored = toy.collect(
        toy.ToyPolicy(),
        toy.make_units(1, per_unit=8),
        reward=lambda final: np.full(len(final), np.nan),
    )
    assert list(pairs_of(scored)) == []
    scored[0].total_B[:] = 1.0
    rows = list(pairs_of(scored))
    assert len(rows) == 4 and {one["label_0"] for one in rows} == {0.5}


def test_a_crop_needs_a_size(tmp_path: Path) -> None:
    """And is what the pictures of a round then are."""
    with pytest.raises(ValidationError, match="size must be > 0 with resize crop"):
        settings(tmp_path, resize="crop")
    halves = np.concatenate([np.zeros((3, 8, 8)), np.full((3, 8, 8), 200)], axis=2)
    blob = encode(halves.astype(np.uint8))
    write_pairs(tmp_path / "p.parquet", [row(0, jpg_0=blob, jpg_1=blob)])
    (whole,) = PairReader(settings(tmp_path, size=8, pairs_per_round=2), 0).round(0)[:1]
    (middle,) = PairReader(settings(tmp_path, size=8, pairs_per_round=2, resize="crop"), 0).round(
        0
    )[:1]
    # the middle of a picture of two halves keeps their sharp edge
    assert np.array_equal(middle.media_0[0], halves[:, :, 4:12])
    assert not np.array_equal(whole.media_0, middle.media_0)
