"""Qwen-Image against diffusers' own pipeline, on a small one of random weights."""

from __future__ import annotations

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.qwen_image import QwenImage
from tests.policies.acceptance import Acceptance, Case, asked

TEXT_TOKENS = 192
"""The template alone is 115 of the small tokenizer's letters."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("qwen") / "pipeline"
    write_pipeline(folder, FAMILIES["qwen_image"])
    return Case(
        recipe=QwenImage(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=16,
        unheard=2,
        call=lambda w: {
            "true_cfg_scale": w,
            "negative_prompt": [" "] * 2,
            "max_sequence_length": TEXT_TOKENS,
        },
        packed=True,
    )


class TestAcceptance(Acceptance):
    pass


def test_a_prompt_is_cut_as_a_calls_is(case: Case) -> None:
    """At ``text_tokens``, and then nothing is masked."""
    text_tokens = 120
    policy = case.varied(text_tokens=text_tokens)
    plan = Plan(steps=2, height=16, width=16)
    noise = torch.randn(1, *policy.latent_shape(plan))
    caption = policy.encode(["a red circle"]).caption
    assert caption["mask_BL"].all()
    wanted, mask = case.pipeline.encode_prompt("a red circle", max_sequence_length=text_tokens)
    assert mask is None
    torch.testing.assert_close(caption["embeds_BLD"], wanted)
    assert policy.family.predict(noise, torch.tensor([500]), caption).isfinite().all()


def test_words_that_are_masked_are_not_heard(case: Case) -> None:
    """Whatever stands behind a prompt's end, bit for bit."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    hidden = ~words["mask_BL"][..., None]
    other = torch.where(hidden, torch.tensor(7.0), words["embeds_BLD"])
    changed = type(words)({**words.tensors, "embeds_BLD": other})
    with torch.no_grad():
        found = policy.family.predict(x, timestep_B, changed)
        assert torch.equal(found, policy.family.predict(x, timestep_B, words))


def test_a_guided_token_is_as_long_as_the_captions_own(case: Case) -> None:
    """Its 2 x 2 places of all channels; the direction is the usual one's."""
    family = case.policy.family
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 1, 4, 4, 6, generator=generator)
    found = family.combine(cond, uncond, 4.0)
    usual = uncond + 4.0 * (cond - uncond)
    for y in (0, 2):
        for x in (0, 2, 4):
            token = (0, slice(None), slice(y, y + 2), slice(x, x + 2))
            wanted = usual[token] * cond[token].norm() / usual[token].norm()
            torch.testing.assert_close(found[token], wanted)


def test_each_thread_has_an_autoencoder_of_its_own(case: Case) -> None:
    """It keeps the features of the frames before on itself."""
    policy = case.policy
    twin = policy.replica()
    assert twin.family.vae is not policy.family.vae
    latents = torch.randn(1, *policy.latent_shape(Plan(height=16, width=16)))
    with torch.no_grad():
        assert torch.equal(twin.decode(latents), policy.decode(latents))


def test_levels_end_at_the_terminal_whatever_the_size(case: Case) -> None:
    """Against the scheduler as the pipeline sets it."""
    import numpy as np
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = case.pipeline.scheduler
    path = case.policy.path
    config = scheduler.config
    for steps in (4, 50):
        for side in (16, 64):
            mu = calculate_shift(
                (side // 4) ** 2,
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            level_K = path.at(Plan(steps=steps, height=side, width=side)).levels(steps)
            wanted = scheduler.sigmas.to(torch.float64)
            torch.testing.assert_close(level_K, wanted, rtol=0, atol=1e-6)
            assert abs(level_K[-2].item() - 0.02) < 1e-9
