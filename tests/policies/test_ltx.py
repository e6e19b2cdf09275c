"""LTX-Video against diffusers' own pipeline, on a small one of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.ltx import LTX, repeat_noise
from tests.policies.acceptance import Acceptance, Case, asked, open_plain
from tests.policies.clip_acceptance import ClipAcceptance

pytestmark = pytest.mark.promise  # the default tests have Wan, a family of clips too

TEXT_TOKENS = 24


def from_tokens(pipeline: Any, tokens_BND: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return pipeline._unpack_latents(tokens_BND, *shape[-3:])


def case_of(name: str, folder: Path, **more: Any) -> Case:
    write_pipeline(folder, FAMILIES[name])
    return Case(
        recipe=LTX(path=str(folder), text_tokens=TEXT_TOKENS, frame_rate=10.0),
        adapted=16,
        call=lambda w: {
            "guidance_scale": w,
            "max_sequence_length": TEXT_TOKENS,
            "frame_rate": 10.0,
        },
        sizes=((32, 32), (64, 96)),
        frames=9,
        to_pipeline=lambda noise: noise.flatten(2).transpose(1, 2),
        from_pipeline=from_tokens,
        # its deep decoder widens the rounding of the latents
        pictures=1e-5,
        **more,
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of("ltx", tmp_path_factory.mktemp("ltx") / "pipeline")


class TestAcceptance(ClipAcceptance):
    pass


@pytest.fixture(scope="module")
def told_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """0.9.1: a decoder that is told a timestep and adds noise of its own, the same in both."""
    return case_of(
        "ltx_091",
        tmp_path_factory.mktemp("ltx_091") / "pipeline",
        prepare=lambda pipeline: repeat_noise(pipeline.vae.decoder),
    )


def test_a_decoder_that_is_told_a_timestep_draws_what_the_pipelines_does(told_case: Case) -> None:
    Acceptance().test_it_draws_what_the_pipeline_draws(told_case, 1, guided=False)


def test_noise_of_the_decoders_own_is_the_same_each_time(told_case: Case) -> None:
    """Whatever torch's global generator is at; plain diffusers' decoder draws from that."""
    policy = told_case.policy
    vae = open_plain(told_case.recipe.path).vae
    scaled = torch.randn(1, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    timestep_B = torch.zeros(1)
    with torch.no_grad():
        plain = [vae.decode(scaled, timestep_B, return_dict=False)[0] for _ in range(2)]
        found = [lane.family.run_decoder(scaled) for lane in (policy, policy, policy.replica())]
    assert not torch.allclose(*plain, atol=1e-3)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_masked_words_are_not_heard(case: Case) -> None:
    """Whatever stands behind a prompt's end, bit for bit."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    assert words["mask_BL"].sum(1).tolist() == [len("a red circle") + 2, len("two") + 2]
    other = torch.where(words["mask_BL"][..., None], words["embeds_BLD"], torch.tensor(7.0))
    changed = type(words)({**words.tensors, "embeds_BLD": other})
    with torch.no_grad():
        found = policy.family.predict(x, timestep_B, changed)
        assert torch.equal(found, policy.family.predict(x, timestep_B, words))


def test_seconds_are_heard(case: Case) -> None:
    """The same latents at another frame rate are another clip."""
    x, timestep_B, words = asked(case.policy, case)
    faster = case.varied(frame_rate=25.0)
    with torch.no_grad():
        said = case.policy.family.predict(x, timestep_B, words)
        assert (faster.family.predict(x, timestep_B, words) - said).abs().max() > 1e-4


def test_levels_follow_size_and_frames_and_end_at_the_terminal(case: Case) -> None:
    """Against the scheduler as the pipeline sets it, up to the size of a call."""
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    scheduler = case.pipeline.scheduler
    config = scheduler.config
    line = (config.base_image_seq_len, config.max_image_seq_len, 0.95, 2.05)
    for steps, frames, height, width in ((4, 9, 32, 32), (50, 161, 512, 704)):
        tokens = ((frames - 1) // 8 + 1) * (height // 32) * (width // 32)
        mu = calculate_shift(tokens, *line)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        plan = Plan(steps=steps, frames=frames, height=height, width=width)
        level_K = case.policy.path.at(plan).levels(steps)
        torch.testing.assert_close(level_K, scheduler.sigmas.double(), rtol=0, atol=1e-6)
        assert abs(level_K[-2].item() - 0.1) < 1e-9


def test_the_own_size_is_the_calls(case: Case) -> None:
    assert case.policy.drawn_size(Plan()) == (512, 704)


def test_tokens_of_several_latents_are_refused(case: Case, tmp_path: Path) -> None:
    write_pipeline(tmp_path, FAMILIES["ltx"])
    file = tmp_path / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"patch_size": 1', '"patch_size": 2'))
    with pytest.raises(UserError, match=r"transformer: patch_size must be 1, got 2; name another"):
        LTX(path=str(tmp_path)).load("cpu")
