"""Families of diffusers' pipelines, trained by each algorithm on Ray: what the same run gives in
one process, bit for bit.

A run is mostly the start of its five processes, each with torch and the libraries of the models, so
that the runs share one Ray and take turns. Every kind of family, and every algorithm that learns in
a way of its own, is in a run of ``make test-promises``; every pair in one of ``make test-slow``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlalign.networks.random_models import FAMILIES, write_pipeline
from tests.policies.family_runs import ALGORITHMS, SETTINGS, run_of_pair, train_two_rounds
from tests.runs import assert_same_run, quiet

PAIRS = [
    *(("sdxl", algorithm) for algorithm in ALGORITHMS),
    *(
        (name, kind)
        for name in ("ltx", "hunyuan_video", "cogvideox")
        for kind in ("grpo", "nft", "dpo")
    ),
    *(
        (name, kind)
        for name in ("flux", "qwen_image", "sd35", "wan22")
        for kind in ("grpo", "nft", "dpo")
    ),
]
"""Random model and algorithm."""
PROMISED = [
    ("sdxl", "ddpo"),
    ("flux", "nft"),
    ("qwen_image", "dpo"),
    ("wan22", "grpo"),
]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("without_report")]


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the run in this process."""
    monkeypatch.setattr("rlalign.report.write_report", quiet)


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a Ray that outlives the runs on it."""
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment("auto")
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False}
    )
    yield found.address
    found.shutdown()


KINDS = {
    "UNet": {"sdxl"},
    "transformer": {"flux", "sd35"},
    "caption with a mask": {"qwen_image"},
    "clips": {"ltx", "hunyuan_video", "cogvideox", "wan22"},
}
"""What models of a kind have in common is what a run on Ray might do otherwise."""


def test_every_kind_and_every_algorithm_is_promised() -> None:
    assert set(PROMISED) <= set(PAIRS)
    assert set().union(*KINDS.values()) == set(SETTINGS)
    promised = {name for name, _ in PROMISED}
    assert all(promised & members for members in KINDS.values())
    # tests/end_to_end/test_every_config.py promises a gradient through the reward on actors
    assert {algorithm for _, algorithm in PROMISED} == set(ALGORITHMS) - {"dpok", "draft"}


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        pytest.param(*pair, marks=pytest.mark.promise if pair in PROMISED else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_it_trains_as_in_one_process(name: str, algorithm: str, head: str, tmp_path: Path) -> None:
    from rlalign.runtime import train_on_ray

    write_pipeline(tmp_path / "model", FAMILIES[name], seed=1)
    run = run_of_pair(name, algorithm, tmp_path / "model")
    train_two_rounds(run, tmp_path / "here")
    train_on_ray(run, tmp_path / "ray", resume=False, on_record=quiet, address=head)
    assert_same_run(tmp_path / "here", tmp_path / "ray")
