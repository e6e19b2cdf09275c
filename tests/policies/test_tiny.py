"""The shipped model of coloured shapes: it loads without a network, and what the rollout stored can
be replayed exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.ddpo import DDPO
from rlalign.core import registry
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.policies.base import Policy
from rlalign.policies.tiny import ASSET, Tiny
from rlalign.rewards.shapes import Shapes
from tests.toy import collect, make_units


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Tiny().load("cpu")


def test_the_asset_is_small_and_holds_no_pickle() -> None:
    files = [p for p in ASSET.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".md"}
    assert sum(p.stat().st_size for p in files) < 20e6


def test_it_is_a_pipeline_of_plain_diffusers() -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    assert isinstance(
        DiffusionPipeline.from_pretrained(ASSET, safety_checker=None), StableDiffusionPipeline
    )


def test_it_draws_no_clips(policy: Policy) -> None:
    with pytest.raises(
        registry.UserError, match="plan.frames must be 1 for a policy that draws pictures, got 9"
    ):
        policy.latent_shape(Plan(frames=9))


def test_it_draws_32_pixels(policy: Policy) -> None:
    (scored,) = collect(policy, make_units(1, per_unit=2, plan=Plan(steps=2)))
    assert scored.media_BFCHW is not None
    assert scored.media_BFCHW.shape == (2, 1, 3, 32, 32)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ratio_is_exactly_one_before_the_first_update(lora_rank: int, guidance: float) -> None:
    """float32, five steps, one step a pass: max |ratio - 1| is 0, not small."""
    policy = Tiny(lora_rank=lora_rank).load("cpu")
    algorithm = DDPO(advantage="global")
    scored = collect(policy, make_units(2, per_unit=2, plan=Plan(steps=5, guidance=guidance)))
    for one in algorithm.make_batch(scored, Memory()).passes(1):
        assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0


def test_a_replica_computes_the_same_bits(policy: Policy) -> None:
    """Another lane, the same unit: latents, log-probs and pictures are equal."""
    units = make_units(1, per_unit=3, plan=Plan(steps=4, guidance=3.0))
    (mine,), (other,) = collect(policy, units), collect(policy.replica(), units)
    assert mine.trajectory is not None
    assert other.trajectory is not None
    assert np.array_equal(mine.trajectory.latents_BK1, other.trajectory.latents_BK1)
    assert np.array_equal(mine.trajectory.log_prob_BK, other.trajectory.log_prob_BK)
    assert mine.media_BFCHW is not None
    assert np.array_equal(mine.media_BFCHW, other.media_BFCHW)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_draws_what_the_caption_says(policy: Policy, seed: int) -> None:
    """Twelve captions, ten steps, guidance 2: the verifier likes the pictures better under their
    own captions.

    Under the next picture's caption the mean score is about 0.6 less; 0.3 is asked for.
    """
    colours = ("red", "green", "blue", "yellow")
    shapes = ("circle", "square", "triangle")
    prompts = tuple(f"a {colours[i % 4]} {shapes[i % 3]}" for i in range(12))
    scorer = Shapes().load("cpu")
    unit = Unit(
        key=UnitKey("evaluate", 0, 0),
        prompts=prompts,
        prompt_ids=tuple(range(12)),
        sample_ids=(0,) * 12,
        seed=seed,
        plan=Plan(steps=10, guidance=2.0),
    )
    (scored,) = collect(policy, [unit])
    media = torch.from_numpy(np.asarray(scored.media_BFCHW)).float() / 255.0
    right = float(np.mean(np.asarray(scorer(media, prompts))))
    wrong = float(np.mean(np.asarray(scorer(media, prompts[1:] + prompts[:1]))))
    assert right - wrong > 0.3, (right, wrong)


def test_another_folder_of_the_format_may_take_its_place(tmp_path: Path) -> None:
    made = registry.build("policies", {"name": "tiny", "path": str(tmp_path)})
    assert isinstance(made, Tiny)
    with pytest.raises(registry.UserError, match="has no model_index.json"):
        made.load("cpu")
