"""The reader over Ray Data: the small reader's pairs, in its order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.data.pairs.rows import Pair

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def row(number: int, **changes: object) -> dict[str, object]:
    picture = np.full((3, 8, 8), number, dtype=np.uint8)
    found = {
        "caption": f"prompt {number}",
        "label_0": float(number % 2),
        "label_1": 1.0 - number % 2,
        "model_0": "me",
    }
    return {**found, "jpg_0": encode(picture), "jpg_1": encode(picture + 100), **changes}


def assert_same(one: Pair, other: Pair) -> None:
    for name in ("caption", "label_0", "row", "source", "crop_0", "crop_1"):
        assert getattr(one, name) == getattr(other, name)
    assert np.array_equal(one.media_0, other.media_0)
    assert np.array_equal(one.media_1, other.media_1)


def test_it_gives_the_small_readers_pairs_in_its_order(ray_cluster: None, tmp_path: Path) -> None:
    """Two files, seven row groups, windows that cut through them; unusable rows and some that
    cannot be decoded, for which others stand in; two epochs, a resumed run, and one that goes
    back."""
    from rlalign.runtime.pairs import RayPairReader

    bad = {
        3: {"caption": None},
        9: {"label_0": None},
        11: {"jpg_0": b"no picture"},
        12: {"has_label": False},
        30: {"jpg_1": b""},
        31: {"label_0": 0.5, "label_1": 0.5},
    }
    for name, first, last in (("a", 0, 20), ("b", 20, 37)):
        rows = [row(n, **{"has_label": True, **bad.get(n, {})}) for n in range(first, last)]
        write_pairs(tmp_path / f"{name}.parquet", rows, rows_per_group=6)
    settings = PreferenceSettings(
        path=str(tmp_path), pairs_per_round=6, pairs_per_pass=4, shuffle=8, size=4, bad_share=0.2
    )
    small = PairReader(settings, seed=1)
    walked = RayPairReader(settings, seed=1)
    resumed = RayPairReader(settings, seed=1)
    assert len(walked) == len(small) == 33
    for number in range(12):
        for one, other in zip(walked.round(number), small.round(number), strict=True):
            assert_same(one, other)
    for number in (5, 1, 9):
        for one, other in zip(resumed.round(number), small.round(number), strict=True):
            assert_same(one, other)
    assert walked.bad.found == small.bad.found and len(small.bad.found) == 4
    assert [len(part) for part in resumed.passes(2)] == [4, 2]
    walked.close()
    resumed.close()


def test_it_gives_those_of_a_list_in_json(ray_cluster: None, tmp_path: Path) -> None:
    """As HPD v2 has it: pictures beside the list, more rows than one group has."""
    from rlalign.runtime.pairs import RayPairReader

    for grey in (10, 20):
        (tmp_path / f"{grey}.png").write_bytes(encode(np.full((3, 8, 8), grey, dtype=np.uint8)))
    entries = [
        {"prompt": f"{n}", "file_path": ["10.png", "20.png"], "human_preference": [n % 2, 1]}
        for n in range(400)
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries), encoding="utf-8")
    settings = PreferenceSettings(
        path=str(tmp_path),
        pairs_per_round=50,
        pairs_per_pass=4,
        shuffle=90,
        ties="half",
        size=6,
        resize="crop",
    )
    small, walked = PairReader(settings, seed=1), RayPairReader(settings, seed=1)
    assert len(walked) == len(small) == 400
    for number in (0, 1, 7, 9):
        for one, other in zip(walked.round(number), small.round(number), strict=True):
            assert_same(one, other)
    walked.close()


def test_it_gives_the_same_buckets(ray_cluster: None, tmp_path: Path) -> None:
    from rlalign.runtime.pairs import RayPairReader

    rows = []
    for number in range(20):
        sides = (8 + number % 5, 8 + 3 * (number % 3))
        pictures = {f"jpg_{i}": np.full((3, *sides), 9 * number + i, np.uint8) for i in (0, 1)}
        rows.append(row(number, **{name: encode(one) for name, one in pictures.items()}))
    write_pairs(tmp_path / "a.parquet", rows, rows_per_group=6)
    settings = PreferenceSettings(
        path=str(tmp_path),
        pairs_per_round=9,
        pairs_per_pass=4,
        shuffle=8,
        size=16,
        resize="buckets",
    )
    small, walked = PairReader(settings, seed=1), RayPairReader(settings, seed=1)
    for number in range(3):
        passes = list(small.passes(number))
        assert len({part[0].media_0.shape for part in passes}) > 2
        for part, other in zip(walked.passes(number), passes, strict=True):
            for one, its in zip(part, other, strict=True):
                assert its.crop_0 is not None
                assert_same(one, its)
    walked.close()


def test_too_many_rows_that_cannot_be_decoded_are_refused(
    ray_cluster: None, tmp_path: Path
) -> None:
    from rlalign.runtime.pairs import RayPairReader

    rows = [row(n, **({"jpg_0": b"no picture"} if n % 4 == 0 else {})) for n in range(20)]
    write_pairs(tmp_path / "c.parquet", rows)
    settings = PreferenceSettings(
        path=str(tmp_path), pairs_per_round=20, pairs_per_pass=4, bad_share=0.05
    )
    reader = RayPairReader(settings, seed=0)
    with pytest.raises(UserError, match=r"at least 2 bad of 20 rows .*c\.parquet:\d+: picture"):
        reader.round(0)
    reader.close()
