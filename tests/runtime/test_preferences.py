"""The reader over Ray Data: every usable pair once per epoch, the same rounds each time, bad rows by their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlalign.arrow import write_pairs
from rlalign.data.preferences import PairReader, PreferenceSettings
from rlalign.data.rankings import encode
from rlalign.registry import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def row(number: int, **changes: object) -> dict[str, object]:
    picture = np.full((3, 8, 8), number, dtype=np.uint8)
    found = {"caption": f"prompt {number}", "label_0": float(number % 2), "label_1": 1.0 - number % 2, "model_0": "me"}
    return {**found, "jpg_0": encode(picture), "jpg_1": encode(picture + 100), **changes}


def test_rounds_are_keyed_and_bad_rows_are_named(ray_cluster: None, tmp_path: Path) -> None:
    from rlalign.runtime.preferences import RayPairReader

    for name, first, last in (("a", 0, 20), ("b", 20, 37)):
        write_pairs(tmp_path / f"{name}.parquet", [row(n) for n in range(first, last)], rows_per_group=6)
    settings = PreferenceSettings(path=str(tmp_path), pairs_per_round=6, pairs_per_pass=4, shuffle=8, size=4)
    walked = RayPairReader(settings, seed=0)
    rounds = [walked.round(r) for r in range(8)]
    seen = [int(pair.picture_0[0, 0, 0]) for pairs in rounds for pair in pairs]
    assert sorted(seen[:37]) == list(range(37)) and seen[:37] != list(range(37))
    small = {pair.row: pair for pair in PairReader(settings, seed=0).all()}
    for pair in rounds[0]:
        same = small[pair.row]
        assert (pair.caption, pair.label_0, pair.source) == (same.caption, same.label_0, same.source)
        assert (pair.picture_1 == same.picture_1).all() and pair.picture_1.shape == (3, 4, 4)
    again = RayPairReader(settings, seed=0)
    for number in (5, 1):  # a resumed run; and back again
        assert [p.row for p in again.round(number)] == [p.row for p in rounds[number]]
    assert [len(part) for part in again.passes(2)] == [4, 2]

    bad = {3: {"caption": None}, 9: {"label_0": None}, 11: {"jpg_0": b"no picture"}, 12: {"has_label": False}}
    rows = [row(n, **{"has_label": True, **bad.get(n, {})}) for n in range(20)]
    for file in tmp_path.iterdir():
        file.unlink()
    write_pairs(tmp_path / "c.parquet", rows)
    lenient = RayPairReader(settings.model_copy(update={"bad_share": 0.15}), seed=0)
    used = {int(p.row.rsplit(":", 1)[1]) for r in range(3) for p in lenient.round(r)}
    assert used <= set(range(20)) - set(bad)
    assert {int(name.rsplit(":", 1)[1]) for name in lenient.bad.found} == {3, 9, 11}
    strict = RayPairReader(settings.model_copy(update={"bad_share": 0.05}), seed=0)
    with pytest.raises(
        UserError, match=r"at least 2 bad of 20 rows .*c\.parquet:3: caption is missing; .*:9: label is"
    ):
        strict.round(2)
    for reader in (walked, again, lenient, strict):
        reader.close()
