"""Every training config in configs/ that is small enough: two rounds on Ray and locally, bitwise equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.config import Run, load_run
from rlalign.loop import train_local
from rlalign.runtime import train_on_ray
from tests.runs import CONFIGS, assert_same_run, metrics

pytestmark = pytest.mark.ray

SMALL = (
    "rounds=2",
    "plan.steps=4",
    "prompts.per_round=4",
    "prompts.samples_per_prompt=4",
    "prompts.per_unit=1",
    "learner.shards=2",
    "evaluate.prompts=4",
    "evaluate.every=1",
    "evaluate.grid=4",
    "checkpoint.every=1",
    "runtime.rollout_workers=2",
)
TINY = [*sorted(path.stem for path in CONFIGS.glob("tiny_*.yaml")), "quickstart"]
QUICK = {"tiny_flow_grpo", "tiny_draft"}
"""The default tests: steps on the flow model, and a learner that samples itself. The rest is marked slow."""


def small(name: str, pairs: Path = Path("pairs.parquet")) -> Run:
    """The config, cut down; where it learns from a set of preferences, from ``pairs``."""
    run = load_run(CONFIGS / f"{name}.yaml", SMALL)
    if run.preferences is None:
        return run
    return load_run(CONFIGS / f"{name}.yaml", [*SMALL, f"preferences.path={pairs}", "preferences.pairs_per_round=16"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some forty drawn pairs: each caption's picture against another's."""
    from rlalign.arrow import write_pairs
    from rlalign.data.rankings import encode
    from rlalign.data.shapes import draw, random_scene
    from rlalign.diffusion.noise import generator

    rows = []
    for number in range(40):
        rng = generator("drawn pairs", number)
        scene, other = random_scene(rng, "train"), random_scene(rng, "train")
        first, second = (encode(draw(s, rng).transpose(2, 0, 1)) for s in (scene, other))
        rows.append({"caption": scene.caption, "jpg_0": first, "jpg_1": second, "label_0": 1.0, "label_1": 0.0})
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_pairs(path, rows)
    return path


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_it_trains_on_ray_as_it_does_locally(name: str, pairs: Path, tmp_path: Path) -> None:
    run = small(name, pairs)
    train_local(run, tmp_path / "local", resume=False, on_record=lambda _: None)
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=lambda _: None)
    assert_same_run(tmp_path / "ray", tmp_path / "local")
    lines = metrics(tmp_path / "local")
    assert [line["round"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] >= 0 for line in lines)
    if "ratio/first_update" in lines[0]:
        assert lines[0]["ratio/first_update"] == 0.0


def test_there_is_a_config_for_every_algorithm() -> None:
    from rlalign.registry import names

    assert {small(name).algorithm.name for name in TINY} == set(names("algorithms"))
