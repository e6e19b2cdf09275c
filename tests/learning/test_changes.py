"""Which samples changed most, and that their pictures come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.core.records import Scored
from rlalign.learning import evaluate
from rlalign.learning.changes import (
    LARGEST,
    choose_changes,
    read_changes,
    write_base,
    write_changes,
)
from tests.toy import PLAN

NAN = float("nan")


def scored_with(score_N, *, seed: int, side: int = 16) -> list[Scored]:
    prompts = [(i, f"prompt {i}") for i in range(len(score_N))]
    rest = np.array(score_N, dtype=np.float32)
    found = []
    for unit in evaluate.evaluation_units(prompts, PLAN, 0, 5):
        size = len(unit.prompts)
        mine, rest = rest[:size], rest[size:]
        rng = np.random.default_rng([seed, unit.key.index])
        media = rng.integers(0, 256, (size, 1, 3, side, side), dtype=np.uint8)
        found.append(Scored(unit=unit, policy_version=0, raw={}, total_B=mine, media_BFCHW=media))
    return found


def test_gains_come_first_and_losses_from_the_largest():
    gain_N = np.array([0.5, -1.0, 0.0, 2.0, NAN, -3.0, 0.25])
    assert choose_changes(gain_N) == [3, 0, 6, 5, 1]
    many = np.arange(-15.0, 16.0)
    chosen = choose_changes(many)
    assert many[chosen].tolist() == [*range(15, 5, -1), *range(-15, -5)]
    assert len(chosen) == 2 * LARGEST
    assert choose_changes(np.array([0.0, NAN])) == []


@pytest.mark.parametrize("side", [16, 300])
def test_pictures_and_scores_come_back(tmp_path, side):
    """Small ones bit for bit; larger ones as a grid keeps them."""
    before = scored_with([0.0, 1.0, 2.0, NAN], seed=1, side=side)
    after = scored_with([3.0, 1.0, 1.5, 4.0], seed=2, side=side)
    write_base(tmp_path, before)
    path = write_changes(tmp_path, 10, after)
    assert path == tmp_path / "samples" / "round-00010-changes.png"
    (gain, loss) = read_changes(tmp_path, 10)
    assert [(b.caption, b.score, a.score) for b, a in (gain, loss)] == [
        ("prompt 0", 0.0, 3.0),
        ("prompt 2", 2.0, 1.5),
    ]
    if side == 16:
        for (one, other), i in ((gain, 0), (loss, 2)):
            for cell, scored in ((one, before), (other, after)):
                pixels = evaluate.media_of(scored)[i, 0].transpose(1, 2, 0)
                np.testing.assert_array_equal(np.asarray(cell.picture), pixels)
    else:
        assert {cell.picture.size for pair in (gain, loss) for cell in pair} == {(256, 256)}


def test_without_a_first_evaluation_there_is_nothing_to_compare(tmp_path):
    assert write_changes(tmp_path, 10, scored_with([1.0, 2.0], seed=1)) is None
    assert read_changes(tmp_path, 10) == []


def test_nothing_changed_makes_no_picture(tmp_path):
    scored = scored_with([1.0, 2.0], seed=1)
    write_base(tmp_path, scored)
    assert write_changes(tmp_path, 10, scored) is None
