"""Families of diffusers' pipelines at work: they train, on Ray as here, and test-time samplers draw
from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from tests.policies.family_runs import PATHS, run_of, sample_of, train_two_rounds
from tests.runs import assert_same_run, quiet

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "sdxl": ({}, "epsilon"),
    "sd35": ({"name": "sd3", "t5_tokens": 16}, "flow"),
    "flux": ({"text_tokens": 16}, "flow"),
    # the template alone is 115 of the small tokenizer's letters
    "qwen_image": ({"text_tokens": 144}, "flow"),
}
"""Random model -> settings of its policy, and its prediction type."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ddpo": {"name": "ddpo"},
    "grpo": {"name": "grpo"},
    "nft": {"name": "diffusion_nft", "draws": 2},
    "dpo": {"name": "diffusion_dpo", "draws": 2},
    "dpok": {"name": "dpok", "value_lr": 0.001},
    "draft": {"name": "reward_backprop", "last_steps": 1},
}
WITHOUT_LIKELIHOODS = ("nft", "dpo")
"""Algorithms that learn from final pictures, however they were drawn."""
ODE = {"epsilon": {"rule": "ddim", "eta": 0.0}, "flow": {"rule": "flow_ode", "eta": 0.0}}
TRAINED = [
    ("sdxl", "ddpo"),
    ("sdxl", "grpo"),
    ("sdxl", "dpo"),
    ("sd35", "grpo"),
    ("flux", "grpo"),
    ("flux", "nft"),
    ("qwen_image", "grpo"),
]
TRAINED_SLOWLY = [
    ("sdxl", "dpok"),
    ("sdxl", "nft"),
    ("sdxl", "draft"),
    ("sd35", "nft"),
    ("sd35", "dpo"),
    ("flux", "dpo"),
    ("qwen_image", "nft"),
    ("qwen_image", "dpo"),
]
SAMPLERS: list[dict[str, Any]] = [
    {"name": "fk_steering", "particles": 2},
    {"name": "best_of_n", "n": 2},
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


def policy_of(name: str, folders: dict[str, Path]) -> dict[str, Any]:
    return {"name": name, "path": str(folders[name]), **SETTINGS[name][0]}


def plan_of(name: str, algorithm: str) -> dict[str, Any]:
    prediction = SETTINGS[name][1]
    if algorithm in WITHOUT_LIKELIHOODS:
        return {**ODE[prediction], "guidance": 1.0}
    return PATHS[prediction]


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [*TRAINED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in TRAINED_SLOWLY)],
)
def test_it_trains_two_rounds(
    name: str, algorithm: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    # gradients pass the shipped reward model
    reward = "bradley_terry" if algorithm == "draft" else "jpeg"
    settings = ALGORITHMS[algorithm]
    run = run_of(policy_of(name, folders), plan_of(name, algorithm), settings, reward)
    train_two_rounds(run, tmp_path)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux", "qwen_image"])
def test_on_ray_it_is_the_same_bit_for_bit(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from rlalign.runtime import train_on_ray

    run = run_of(policy_of(name, folders), plan_of(name, "grpo"), ALGORITHMS["grpo"])
    train_two_rounds(run, tmp_path / "here")
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "here", tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_edict_draws_from_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Its coupled chains run in float64, the denoiser too."""
    sample_of(policy_of(name, folders), ODE[SETTINGS[name][1]], {"name": "edict"}, tmp_path)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "sampler",
    [*SAMPLERS, pytest.param({"name": "demon", "candidates": 2}, marks=pytest.mark.slow)],
    ids=lambda sampler: sampler["name"],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_samplers_draw_from_it(
    name: str, sampler: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two pictures, whose method has spent more than the plain sampler."""
    plan = PATHS[SETTINGS[name][1]]
    result = sample_of(policy_of(name, folders), plan, sampler, tmp_path)
    method, plain, *_ = result["methods"]
    assert method["cost"]["denoiser_calls"] >= 2 * plain["cost"]["denoiser_calls"] > 0
    assert method["cost"]["reward_queries"] > 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
