"""Simulated pairs: the labels are the hidden utility's, exact or Bradley-Terry-noisy, whatever the
number of threads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.core.prompts import record_of
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.data.shapes import parse_caption, random_scene, split_of
from rlalign.fitting.reward.settings import FitReward
from rlalign.fitting.reward.simulate import _label, one_fact_changed, simulate_pairs
from rlalign.rewards.shapes import Shapes


def quiet(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


def config(**changes: object) -> FitReward:
    simulate = {
        "utility": [{"name": "shapes", "weight": 2.0}, {"name": "jpeg", "weight": 0.01}],
        "prompts": {"name": "shapes", "per_unit": 2},
        "plan": {"steps": 2},
        "pairs": 20,
        "samples_per_prompt": 3,
        "drawn": 0.5,
        **changes,
    }
    return FitReward.model_validate({"simulate": simulate})


def test_labels_are_those_of_the_utility_and_pairs_share_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    simulate_pairs(config(), file, quiet)
    pairs = list(
        PairReader(PreferenceSettings(path=str(file), pairs_per_round=16, ties="half"), 0).all()
    )
    assert Counter(p.source for p in pairs) == {"tiny": 10, "drawn": 10}
    shapes = Shapes().load("cpu")
    for pair in pairs:
        media = torch.from_numpy(np.stack([pair.media_0, pair.media_1])).float() / 255
        facts = shapes(media, [pair.caption] * 2)
        if pair.source == "drawn":
            assert float(facts.max()) == 1.0
        if abs(float(facts[0] - facts[1])) > 0.1:  # far more than a kilobyte at weight 0.01
            assert pair.label_0 == float(facts[0] > facts[1])
    assert {p.label_0 for p in pairs if p.source == "drawn"} == {0.0, 1.0}, (
        "the true scene is not always the first"
    )


def test_records_of_prompts_come_along(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "n": 1}\n"a blue square"\n')
    prompts = {"name": "file", "path": str(tmp_path / "p.jsonl"), "column": "prompt"}
    file = tmp_path / "pairs.parquet"
    simulate_pairs(config(prompts={**prompts, "per_unit": 1}, pairs=8), file, quiet)
    settings = PreferenceSettings(path=str(file), pairs_per_round=16, ties="half")
    found = {
        (p.source, str(p.caption), *record_of(p.caption)) for p in PairReader(settings, 0).all()
    }
    assert {one[1:] for one in found if one[0] == "tiny"} == {
        ("a red circle", "n"),
        ("a blue square",),
    }
    assert {len(one) for one in found if one[0] == "drawn"} == {2}


def test_the_set_depends_on_the_seed_alone(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.parquet" for n in range(3)]
    for file, lanes, seed in zip(files, (1, 3, 1), (0, 0, 1), strict=True):
        simulate_pairs(config(lanes=lanes).model_copy(update={"seed": seed}), file, quiet)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(("difference", "temperature"), [(0.3, 0.2), (-0.5, 1.0), (0.0, 0.1)])
def test_a_noisy_judge_decides_as_bradley_and_terry_say(
    difference: float, temperature: float
) -> None:
    """4000 labels: the share of wins is within three standard errors (0.024) of the sigmoid."""
    wins = [_label(0, difference, temperature, (f"a{n}", f"b{n}")) for n in range(4000)]
    assert set(wins) == {0.0, 1.0}
    assert np.mean(wins) == pytest.approx(1 / (1 + np.exp(-difference / temperature)), abs=0.024)


def test_an_exact_judge_knows_ties() -> None:
    assert [_label(0, d, 0.0, ("a", "b")) for d in (0.2, -0.2, 0.0)] == [1.0, 0.0, 0.5]


def test_one_changed_fact_is_another_scene_of_the_grammar() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        scene = random_scene(rng, "train")
        other = one_fact_changed(scene, rng)
        assert (
            other != scene and parse_caption(other.caption) == other and split_of(other) != "novel"
        )
        assert len(other.groups) == len(scene.groups)
        if other.groups == scene.groups:
            kinds.add("relation")
        elif other.groups == scene.groups[::-1]:
            kinds.add("order")
        else:
            ((mine, its),) = [
                (a, b) for a, b in zip(scene.groups, other.groups, strict=True) if a != b
            ]
            (changed,) = [
                f for f in ("number", "colour", "shape") if getattr(mine, f) != getattr(its, f)
            ]
            kinds.add(changed)
    assert kinds == {"number", "colour", "shape", "relation", "order"}
