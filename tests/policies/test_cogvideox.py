"""CogVideoX against diffusers' own pipeline, on small ones of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.cogvideox import CogVideoX
from tests.policies.acceptance import Acceptance, Case, asked
from tests.policies.clip_acceptance import ClipAcceptance

pytestmark = pytest.mark.promise  # the default tests have Wan, a family of clips too

TEXT_TOKENS = 24


def from_frames(pipeline: Any, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return latents.transpose(1, 2)


def case_of(name: str, folder: Path) -> Case:
    write_pipeline(folder, FAMILIES[name])
    return Case(
        recipe=CogVideoX(path=str(folder)),
        adapted=8,
        call=lambda w: {"guidance_scale": w, "max_sequence_length": TEXT_TOKENS},
        sizes=((16, 16), (16, 24)),
        frames=9,
        to_pipeline=lambda noise: noise.transpose(1, 2),
        from_pipeline=from_frames,
        # its deep decoder widens the rounding of the latents
        pictures=1e-5,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of("cogvideox", tmp_path_factory.mktemp("cogvideox") / "pipeline")


class TestAcceptance(ClipAcceptance):
    pass


@pytest.fixture(scope="module", params=["cogvideox_2b", "cogvideox_15"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


def test_others_draw_what_their_pipelines_draw(other: Case) -> None:
    """2B, whose places are not rotated, and 1.5, whose tokens are two frames deep."""
    Acceptance().test_it_draws_what_the_pipeline_draws(other, 1, guided=True)


def test_others_can_be_merged(other: Case, tmp_path: Path) -> None:
    """Tables of places are not stored, and are made again."""
    Acceptance().test_its_merged_pipeline_is_one_of_plain_diffusers(other, tmp_path)


def test_others_take_frames_as_the_pipelines_do(other: Case) -> None:
    ClipAcceptance().test_other_numbers_of_frames_are_refused(other)


def test_in_1_5_a_frame_stands_before_the_first(other: Case) -> None:
    """It is drawn, and not decoded; of a clip it is a copy of the first, mean and deviation."""
    policy = other.policy
    plan = Plan(height=16, width=16, frames=9)
    depth = policy.family.network.config.patch_size_t
    assert policy.latent_shape(plan) == (4, 4 if depth == 2 else 3, 4, 4)
    if depth != 2:
        return
    latents = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, :, 0] += 1.0
    with torch.no_grad():
        media = policy.decode(latents)
        assert torch.equal(policy.decode(changed), media)
        mean, deviation = policy.posterior(media)
    assert deviation is not None
    for tensor in (mean, deviation):
        assert tensor.shape == latents.shape
        assert torch.equal(tensor[:, :, 0], tensor[:, :, 1])


def test_sampling_begins_without_signal_and_ends_clean(case: Case) -> None:
    """Against the scheduler as the pipeline sets it."""
    path = case.policy.path
    assert case.policy.prediction == "v_prediction"
    scheduler = case.pipeline.scheduler
    for steps in (1, 4, 50):
        scheduler.set_timesteps(steps)
        level_K = path.levels(steps)
        assert level_K[:-1].tolist() == scheduler.timesteps.tolist()
    assert path.alpha(level_K[0]) == 0.0 and path.sigma(level_K[0]) == 1.0
    assert path.alpha(level_K[-1]) == 1.0 and path.sigma(level_K[-1]) == 0.0
    alpha_K = scheduler.alphas_cumprod[scheduler.timesteps].sqrt().double()
    torch.testing.assert_close(path.alpha(level_K[:-1]), alpha_K, rtol=0, atol=1e-12)


def test_padding_is_attended(case: Case) -> None:
    """T5's words are told without a mask: what stands behind a prompt's end is heard."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    embeds_BLD = words["embeds_BLD"].clone()
    assert embeds_BLD.shape[1] == TEXT_TOKENS
    embeds_BLD[:, -1] += 1.0
    with torch.no_grad():
        moved = policy.family.predict(x, timestep_B, type(words)({"embeds_BLD": embeds_BLD}))
        assert (moved - policy.family.predict(x, timestep_B, words)).abs().max() > 1e-4


def test_the_own_size_is_the_transformers(case: Case) -> None:
    assert case.policy.drawn_size(Plan()) == (16, 16)


def test_a_transformer_that_is_told_more_is_refused(tmp_path: Path) -> None:
    """As that of 1.5 which draws on from a picture."""
    family = FAMILIES["cogvideox"]
    told = family.networks["transformer"].vary(same={"ofs_embed_dim": 8})
    write_pipeline(tmp_path, replace(family, networks={**family.networks, "transformer": told}))
    with pytest.raises(UserError, match="transformer: ofs_embed_dim must be null, got 8; name"):
        CogVideoX(path=str(tmp_path)).load("cpu")
