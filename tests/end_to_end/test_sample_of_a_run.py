"""Training and test-time alignment together: a run folder is a policy, and interpolation goes
between it and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.config import load_run
from rlalign.sampling import sample_local
from rlalign.sampling.settings import parse_sample

PROMPTS = {
    "points": {"name": "list", "prompts": ["left", "right", "up"]},
    "tiny": {"name": "shapes"},
}


def _pictures(folder: Path, policy: Any, interpolation: float, family: str) -> np.ndarray:
    from PIL import Image

    settings = {
        "name": "some",
        "policy": policy,
        "interpolation": interpolation,
        "plan": {"steps": 4, "eta": 1.0},
        "prompts": PROMPTS[family],
        "pictures": 3,
        "rewards": [{"name": "jpeg"}],
        "sampler": {"name": "plain"},
        "compare": False,
    }
    sample_local(parse_sample(settings), folder, lambda record: None)
    return np.stack(
        [np.asarray(Image.open(p), dtype=int) for p in sorted(folder.glob("pictures/*.png"))]
    )


@pytest.mark.promise
def test_interpolation_goes_from_the_base_to_the_aligned_model_and_beyond(
    local_run: Path, tmp_path: Path
) -> None:
    family = load_run(local_run / "config.yaml").policy.name
    base = _pictures(tmp_path / "base", {"name": family}, 1.0, family)
    aligned = _pictures(tmp_path / "aligned", str(local_run), 1.0, family)
    assert np.abs(base - aligned).max() > 0, "four rounds moved it"
    none = _pictures(tmp_path / "none", str(local_run), 0.0, family)
    # the base by way of a difference that is taken back: one rounding of a byte
    assert np.abs(none - base).max() <= 1
    beyond = _pictures(tmp_path / "beyond", str(local_run), 3.0, family)
    assert np.abs(beyond - base).mean() > np.abs(aligned - base).mean()
