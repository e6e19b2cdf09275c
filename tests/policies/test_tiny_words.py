"""The shipped model of words: plain diffusers loads it, two readers read what it writes, and it
leaves something to learn."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.data.prompts.words import Words
from rlalign.diffusion.rollout import rollout
from rlalign.policies.base import Policy
from rlalign.policies.tiny_words import ASSET, TinyWords
from rlalign.rewards.base import score

HELD_OUT = Words().held_out(64)
READERS = {
    "ocr": {"name": "ocr", "detect": False, "zoom": 1.5, "line_width": 96},
    "tesseract": {"name": "tesseract", "detect": False, "zoom": 3.0},
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return TinyWords().load("cpu")


def unit_of(count: int, plan: Plan) -> Unit:
    return Unit(
        key=UnitKey("evaluate", 0, 0),
        prompts=tuple(text for _, text in HELD_OUT[:count]),
        prompt_ids=tuple(number for number, _ in HELD_OUT[:count]),
        sample_ids=(0,) * count,
        seed=0,
        plan=plan,
    )


def test_the_asset_is_small_and_holds_no_pickle() -> None:
    files = [p for p in ASSET.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert sum(p.stat().st_size for p in files) < 8e6


def test_plain_diffusers_draws_the_same_pictures(policy: Policy) -> None:
    """Those of a call without T5's rows of zeros: one grey level."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ASSET, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    unit = unit_of(4, Plan(steps=4, rule="flow_ode", eta=0.0))
    trajectory, media = rollout(policy, unit, 0)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 0}
    pictures_BCHW = pipeline(
        list(unit.prompts),
        latents=torch.from_numpy(trajectory.latents_BK1[:, 0]),
        output_type="pt",
        **settings,
    ).images
    grey_BFCHW = torch.from_numpy(media).float()
    assert (pictures_BCHW[:, None] * 255.0 - grey_BFCHW).abs().max() < 0.5 + 0.1


@pytest.mark.promise
def test_held_out_words_are_read_and_something_is_left_to_learn(policy: Policy) -> None:
    """The plan of configs/tiny_ocr.yaml on 64 words that no picture of its corpus shows."""
    _, media = rollout(policy, unit_of(64, Plan(steps=5, rule="flow_ode", eta=0.0)), 0)
    own = [text for _, text in HELD_OUT]
    for settings in READERS.values():
        reward = build("rewards", settings)
        live = reward.load("cpu")
        right = score(reward, live, media, own).mean()
        wrong = score(reward, live, media, own[1:] + own[:1]).mean()
        assert 0.3 < right < 0.7
        assert right > wrong + 0.15


def test_a_letter_of_the_caption_changes_the_picture_where_it_stands(policy: Policy) -> None:
    """From the same noise, CAT and CAN differ on the right more than on the left."""
    plan = Plan(steps=6, rule="flow_ode", eta=0.0)
    pair = Unit(
        key=UnitKey("evaluate", 0, 0),
        prompts=('the word "CAT"', 'the word "CAN"'),
        prompt_ids=(1, 1),
        sample_ids=(0, 0),
        seed=0,
        plan=plan,
    )
    _, media = rollout(policy, pair, 0)
    change_HW = np.abs(media[0, 0].astype(float) - media[1, 0].astype(float)).sum(axis=0)
    left, right = change_HW[:, :15].mean(), change_HW[:, 17:25].mean()
    assert right > 2 * left


def test_a_saved_policy_says_nothing_of_the_parts_that_it_lacks(
    policy: Policy, tmp_path: Path
) -> None:
    """T5, which diffusers would name on the user's screen."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    policy.save(tmp_path / "policy")
    logger.removeHandler(handler)
    assert (tmp_path / "policy" / "model_index.json").is_file()
    assert not said
