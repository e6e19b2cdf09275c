"""Families of diffusers' pipelines at work: they train, and test-time samplers draw from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from tests.policies.family_runs import (
    ODE,
    PATHS,
    SETTINGS,
    policy_of,
    run_of_pair,
    sample_of,
    train_two_rounds,
)
from tests.runs import quiet

TRAINED = [
    ("sdxl", "ddpo"),
    ("sdxl", "grpo"),
    ("sdxl", "dpo"),
    ("sd35", "grpo"),
    ("flux", "grpo"),
    ("flux", "nft"),
    ("ltx", "grpo"),
    ("ltx", "nft"),
    ("hunyuan_video", "grpo"),
    ("cogvideox", "grpo"),
    ("cogvideox", "dpo"),
    ("qwen_image", "grpo"),
    ("wan22", "grpo"),
    ("wan22", "nft"),
]
"""Random model and algorithm; test_families_on_ray.py has the other pairs too."""
SAMPLERS: list[dict[str, Any]] = [
    {"name": "fk_steering", "particles": 2},
    {"name": "best_of_n", "n": 2},
    {"name": "demon", "candidates": 2},
]

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes as long as the rounds."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in SETTINGS}
    for name, folder in made.items():
        write_pipeline(folder, FAMILIES[name], seed=1)
    return made


@pytest.mark.promise
@pytest.mark.parametrize(("name", "algorithm"), TRAINED)
def test_it_trains_two_rounds(
    name: str, algorithm: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    train_two_rounds(run_of_pair(name, algorithm, folders[name]), tmp_path)


@pytest.mark.promise
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "cogvideox"])
def test_edict_draws_from_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Its coupled chains run in float64, the denoiser too."""
    plan = ODE[SETTINGS[name][1]]
    sample_of(policy_of(name, folders[name]), plan, {"name": "edict"}, tmp_path)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.promise
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["name"])
@pytest.mark.parametrize("name", SETTINGS)
def test_samplers_draw_from_it(
    name: str, sampler: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two pictures, whose method has spent more than the plain sampler."""
    plan = PATHS[SETTINGS[name][1]]
    result = sample_of(policy_of(name, folders[name]), plan, sampler, tmp_path)
    method, plain, *_ = result["methods"]
    assert method["cost"]["denoiser_calls"] >= 2 * plain["cost"]["denoiser_calls"] > 0
    assert method["cost"]["reward_queries"] > 0
    assert len(list((tmp_path / "pictures").iterdir())) == 2
