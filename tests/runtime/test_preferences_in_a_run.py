"""A run whose preference pairs come through Ray Data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from tests.runtime.test_pairs import row

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_learns_from_ray_datas_stream_the_same_twice(tmp_path: Path) -> None:
    """Two rounds of offline Diffusion-DPO whose pairs come through Ray Data: the same weights both
    times."""
    from rlalign.alignment.loop import train_local
    from rlalign.runtime import train_on_ray
    from tests.runs import assert_same_run, small_run

    pairs = [row(n, caption="a red circle above a blue square") for n in range(16)]
    rng = np.random.default_rng(0)
    for one in pairs:
        one |= {
            side: encode(rng.integers(0, 255, (3, 32, 32), dtype=np.uint8))
            for side in ("jpg_0", "jpg_1")
        }
    write_pairs(tmp_path / "pairs.parquet", pairs)
    settings = (
        f"preferences={{path: {tmp_path / 'pairs.parquet'}, reader: ray, pairs_per_round: 8,"
        " pairs_per_pass: 4}"
    )
    run = small_run("rounds=2", settings, config="tiny_dpo_offline")
    for name in ("one", "two"):
        train_on_ray(run, tmp_path / name, resume=False, on_record=lambda line: None)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    with pytest.raises(UserError, match="preferences.reader must be arrow with --local"):
        train_local(run, tmp_path / "three", resume=False, on_record=lambda line: None)
