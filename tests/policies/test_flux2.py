"""FLUX.2 against diffusers' own pipelines, on small ones of random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.flux2 import Flux2
from tests.policies.acceptance import PROMPTS, Acceptance, Case, asked

pytestmark = pytest.mark.promise  # the default tests have FLUX.1 and Z-Image

TEXT_TOKENS = 64
"""A klein's template and the longer prompt are fewer of the small tokenizer's letters; dev's system
message is cut."""
DEV_TOKENS = 288
LAYERS = 8 + 2
"""Of a joint block, and of a single one."""


def from_tokens(pipeline: Any, tokens_BND: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """dev's final latents, which are the transformer's tokens, row by row."""
    return tokens_BND.transpose(1, 2).reshape(*shape)


def from_autoencoders(pipeline: Any, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """klein's final latents, which are the autoencoder's own."""
    with torch.no_grad():
        found = pipeline.vae.bn(pipeline._patchify_latents(latents))
    assert found.shape == torch.Size(shape)
    return found


def klein(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["flux2_klein"])
    return Case(
        recipe=Flux2(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=LAYERS,
        call=lambda w: {"guidance_scale": w, "max_sequence_length": TEXT_TOKENS},
        from_pipeline=from_autoencoders,
    )


def klein_distilled(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["flux2_klein_distilled"])
    return Case(
        recipe=Flux2(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=LAYERS,
        # a call of a distilled one leaves its guidance unused
        call=lambda w: {"guidance_scale": 4.0, "max_sequence_length": TEXT_TOKENS},
        guidance=1.0,
        from_pipeline=from_autoencoders,
    )


def dev(folder: Path) -> Case:
    write_pipeline(folder, FAMILIES["flux2"])
    return Case(
        recipe=Flux2(path=str(folder), text_tokens=DEV_TOKENS, embedded_guidance=2.5),
        adapted=LAYERS,
        call=lambda w: {"guidance_scale": 2.5, "max_sequence_length": DEV_TOKENS},
        guidance=1.0,
        from_pipeline=from_tokens,
    )


CASES: dict[str, Callable[[Path], Case]] = {"klein": klein, "dev": dev}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


class TestAcceptance(Acceptance):
    """Each case is taken by diffusers as by rlalign."""


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return klein_distilled(tmp_path_factory.mktemp("pipeline"))


@pytest.mark.parametrize("size", [0, 1], ids=["first size", "second size"])
def test_a_distilled_klein_draws_what_its_pipeline_draws(distilled: Case, size: int) -> None:
    """Whatever guidance the call is given; in all else it is klein."""
    Acceptance().test_it_draws_what_the_pipeline_draws(distilled, size, guided=False)


def test_a_distilled_klein_has_no_guidance(distilled: Case) -> None:
    assert distilled.policy.latent_shape(Plan(height=16, width=16, guidance=1.0)) == (16, 4, 4)
    with pytest.raises(UserError, match=r"plan\.guidance must be 1 for '.*'.*got 4; it imitates"):
        distilled.policy.latent_shape(Plan(height=16, width=16, guidance=4.0))


def test_single_blocks_are_adapted_whole(case: Case) -> None:
    """Their joined projections and their answer, beside the eight layers of a joint block."""
    policy = case.varied(lora_rank=2)
    names = {name.split(".lora_")[0] for name in policy.trainable()}
    single = {name for name in names if name.startswith("single_transformer_blocks.")}
    assert single == {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.0.attn.to_out",
    }
    assert len(names - single) == 8


def test_levels_follow_size_and_steps_as_the_pipelines(case: Case) -> None:
    """Below and above 4300 tokens."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    scheduler = case.pipeline.scheduler
    for steps in (1, 4, 50):
        for side in (16, 64, 264):
            mu = compute_empirical_mu(image_seq_len=(side // 4) ** 2, num_steps=steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            found = case.policy.path.at(Plan(steps=steps, height=side, width=side)).levels(steps)
            wanted = scheduler.sigmas.to(torch.float64)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_only_a_base_model_is_guided_by_the_plan(case: Case) -> None:
    """dev has a setting of its own, which its transformer is told, and klein's is not."""
    plan = Plan(steps=2, height=16, width=16, guidance=4.0)
    is_dev = type(case.pipeline).__name__ == "Flux2Pipeline"
    if is_dev:
        rule = r"plan\.guidance must be 1 for '.*'.*got 4; set policy\.embedded_guidance"
        with pytest.raises(UserError, match=rule):
            case.policy.latent_shape(plan)
    else:
        assert case.policy.latent_shape(plan) == (16, 4, 4)
    x, timestep_B, words = asked(case.policy, case)
    other = case.varied(embedded_guidance=8.0).family
    with torch.no_grad():
        said = case.policy.family.predict(x, timestep_B, words)
        moved = other.predict(x, timestep_B, words) - said
    assert bool(moved.any()) == is_dev


def test_padding_is_attended(case: Case) -> None:
    """So the width is a part of the model: another one is another answer."""
    narrow = case.recipe.text_tokens - 8  # type: ignore[attr-defined]
    other = case.varied(text_tokens=narrow)
    x = torch.randn(2, *case.policy.latent_shape(Plan(height=16, width=16)))
    timestep_B = torch.tensor([700.0, 200.0])
    with torch.no_grad():
        wide = case.policy.family.predict(x, timestep_B, case.policy.encode(PROMPTS).caption)
        found = other.family.predict(x, timestep_B, other.encode(PROMPTS).caption)
    assert (found - wide).abs().max() > 1e-4
