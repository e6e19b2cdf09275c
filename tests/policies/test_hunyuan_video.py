"""HunyuanVideo against diffusers' own pipeline, on a small one of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.hunyuan_video import HunyuanVideo
from tests.policies.acceptance import PROMPTS, Case, asked
from tests.policies.clip_acceptance import ClipAcceptance

pytestmark = pytest.mark.promise  # the default tests have Wan, a family of clips too

TEXT_TOKENS = 352
"""The template before a prompt is some 430 of the small tokenizer's letters, of which 95 are cut
away."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("hunyuan") / "pipeline"
    write_pipeline(folder, FAMILIES["hunyuan_video"])
    return Case(
        recipe=HunyuanVideo(path=str(folder), text_tokens=TEXT_TOKENS, embedded_guidance=4.0),
        # a joint block, a single one and one that refines the words
        adapted=8 + 3 + 4,
        call=lambda w: {
            "guidance_scale": 4.0,
            "true_cfg_scale": w,
            "negative_prompt": [""] * len(PROMPTS),
            "max_sequence_length": TEXT_TOKENS,
        },
        sizes=((32, 16), (32, 48)),
        frames=5,
        # its deep decoder widens the rounding of the latents
        pictures=1e-5,
    )


class TestAcceptance(ClipAcceptance):
    pass


def test_levels_are_those_of_the_pipeline(case: Case) -> None:
    """At a shift of 7, whatever is drawn."""
    import numpy as np

    scheduler = case.pipeline.scheduler
    for steps in (1, 4, 50):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        found = case.policy.path.at(Plan(steps=steps, frames=129)).levels(steps)
        torch.testing.assert_close(found, scheduler.sigmas.double(), rtol=0, atol=1e-6)


def test_the_guidance_that_is_told_is_heard_and_no_pass_more(case: Case) -> None:
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    other = case.varied(embedded_guidance=8.0)
    with torch.no_grad():
        said = policy.family.predict(x, timestep_B, words)
        assert (other.family.predict(x, timestep_B, words) - said).abs().max() > 1e-4
    assert policy.family.calls_per_look(Plan(guidance=1.0)) == 1


def test_a_prompt_keeps_its_length_in_the_mask(case: Case) -> None:
    """And the two are told apart by both encoders."""
    caption = case.policy.encode(PROMPTS).caption
    lengths = caption["mask_BL"].sum(1).tolist()
    assert lengths[0] - lengths[1] == len("a red circle") - len("two")
    assert lengths[0] < TEXT_TOKENS
    for name in ("embeds_BLD", "pooled_BD"):
        assert not torch.allclose(*caption[name], atol=1e-3), name


def test_masked_words_are_heard_by_nothing_that_is_drawn(case: Case) -> None:
    """To rounding: what fills a prompt up attends, and is not attended."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    other = torch.where(words["mask_BL"][..., None], words["embeds_BLD"], torch.tensor(7.0))
    changed = type(words)({**words.tensors, "embeds_BLD": other})
    with torch.no_grad():
        found = policy.family.predict(x, timestep_B, changed)
        torch.testing.assert_close(
            found, policy.family.predict(x, timestep_B, words), rtol=0, atol=1e-6
        )


def test_the_own_size_is_the_calls(case: Case) -> None:
    assert case.policy.drawn_size(Plan()) == (720, 1280)


def test_a_transformer_that_is_told_a_picture_is_refused(case: Case, tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["hunyuan_video"])
    file = tmp_path / "transformer" / "config.json"
    was = '"image_condition_type": null'
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, '"image_condition_type": "latent_concat"'))
    rule = r"transformer: image_condition_type must be null, got 'latent_concat'; name another"
    with pytest.raises(UserError, match=rule):
        HunyuanVideo(path=str(tmp_path)).load("cpu")
