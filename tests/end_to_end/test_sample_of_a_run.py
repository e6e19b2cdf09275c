"""Training and test-time alignment together: a run folder is a policy, and interpolation goes between it and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlalign.sample import sample_local
from rlalign.sample.settings import parse_sample


def _pictures(folder: Path, policy: Any, interpolation: float) -> np.ndarray:
    from PIL import Image

    settings = {
        "name": "some",
        "policy": policy,
        "interpolation": interpolation,
        "plan": {"steps": 4, "eta": 1.0},
        "prompts": {"name": "shapes"},
        "pictures": 3,
        "rewards": [{"name": "shapes"}],
        "sampler": {"name": "plain"},
        "compare": False,
    }
    sample_local(parse_sample(settings), folder, lambda record: None)
    return np.stack([np.asarray(Image.open(p), dtype=int) for p in sorted(folder.glob("pictures/*.png"))])


def test_interpolation_goes_from_the_base_to_the_aligned_model_and_beyond(local_run: Path, tmp_path: Path) -> None:
    base = _pictures(tmp_path / "base", {"name": "tiny"}, 1.0)
    aligned = _pictures(tmp_path / "aligned", str(local_run), 1.0)
    assert np.abs(base - aligned).max() > 0  # four rounds moved it
    none = _pictures(tmp_path / "none", str(local_run), 0.0)
    assert np.abs(none - base).max() <= 1  # the base by way of a difference that is taken back: one rounding of a byte
    beyond = _pictures(tmp_path / "beyond", str(local_run), 3.0)
    assert np.abs(beyond - base).mean() > np.abs(aligned - base).mean()
