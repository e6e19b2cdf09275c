"""Sana against diffusers' own pipeline, on a small one of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.sana import Sana
from tests.policies.acceptance import PROMPTS, Acceptance, Case

pytestmark = pytest.mark.promise  # the default tests have Qwen-Image, with a mask too

TEXT_TOKENS = 24


def step_once(pipeline: Any) -> None:
    """The shipped solver at order one, where its step is Euler's, on its own levels; its timesteps
    are not cut to whole numbers."""
    from diffusers import DPMSolverMultistepScheduler

    class FirstOrder(DPMSolverMultistepScheduler):
        def set_timesteps(self, *args: Any, **settings: Any) -> None:
            super().set_timesteps(*args, **settings)
            self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps

    pipeline.scheduler = FirstOrder.from_config(pipeline.scheduler.config, solver_order=1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("sana") / "pipeline"
    write_pipeline(folder, FAMILIES["sana"])
    return Case(
        recipe=Sana(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=8,
        call=lambda w: {
            "guidance_scale": w,
            "use_resolution_binning": False,
            "max_sequence_length": TEXT_TOKENS,
        },
        sizes=((32, 32), (64, 32)),
        prepare=step_once,
        instructed=True,
    )


class TestAcceptance(Acceptance):
    pass


def test_the_empty_caption_is_read_without_the_instruction(case: Case) -> None:
    """As a call's negative prompt; a caption after it, and both are said when it is off."""
    policy = case.policy
    plain = case.varied(instruction=False)
    condition = policy.encode(PROMPTS)
    alone = plain.encode(PROMPTS)
    settings: Any = {"max_sequence_length": TEXT_TOKENS, "device": "cpu"}
    told = {"complex_human_instruction": policy.family.instruction}
    for found, lines in ((condition, told), (alone, {})):
        wanted = case.pipeline.encode_prompt(list(PROMPTS), **settings, **lines)
        for name, index in (("embeds_BLD", 0), ("mask_BL", 1)):
            mine = found.caption[name].to(wanted[index])
            torch.testing.assert_close(mine, wanted[index], atol=1e-6, rtol=1e-5)
            other = wanted[index + 2].to(wanted[index])
            torch.testing.assert_close(found.empty[name].to(other), other, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(condition.caption["embeds_BLD"], alone.caption["embeds_BLD"])


def test_a_negative_prompt_is_read_without_it_too(case: Case) -> None:
    condition = case.varied(negative_prompt="Blue").encode(PROMPTS)
    plain = case.varied(instruction=False).encode(["blue"])
    assert condition.against is not None
    for name, tensor in plain.caption.tensors.items():
        assert torch.equal(condition.against[name][1:], tensor)


def test_levels_are_the_shipped_solvers(case: Case) -> None:
    scheduler = case.pipeline.scheduler
    for steps in (1, 4, 20):
        scheduler.set_timesteps(steps)
        found = case.policy.path.at(Plan(steps=steps)).levels(steps)
        wanted = scheduler.sigmas.to(torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
