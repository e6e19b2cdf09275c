"""Z-Image against diffusers' own pipeline, on a small one of random weights."""

from __future__ import annotations

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.z_image import ZImage
from tests.policies.acceptance import Acceptance, Case, asked

TEXT_TOKENS = 96
"""The template is 54 of the small tokenizer's letters."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("z_image") / "pipeline"
    write_pipeline(folder, FAMILIES["z_image"])
    return Case(
        recipe=ZImage(path=str(folder), text_tokens=TEXT_TOKENS),
        adapted=16,
        # a call's guidance counts from 0
        call=lambda w: {"guidance_scale": w - 1.0, "max_sequence_length": TEXT_TOKENS},
    )


class TestAcceptance(Acceptance):
    pass


def test_a_caption_keeps_its_own_length(case: Case) -> None:
    """What stands behind its end is not heard, bit for bit, and a longer one is another caption,
    as the learned tokens that fill it up are attended."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    mask_BL = words["mask_BL"]
    lengths = mask_BL.sum(1).tolist()
    assert lengths[0] - lengths[1] == len("a red circle") - len("two")
    other = torch.where(mask_BL[..., None], words["embeds_BLD"], torch.tensor(7.0))
    changed = type(words)({**words.tensors, "embeds_BLD": other})
    longer = type(words)({**words.tensors, "mask_BL": torch.ones_like(mask_BL)})
    with torch.no_grad():
        said = policy.family.predict(x, timestep_B, words)
        assert torch.equal(policy.family.predict(x, timestep_B, changed), said)
        assert (policy.family.predict(x, timestep_B, longer) - said).abs().max() > 1e-4


def test_it_is_told_cleanness_and_answers_minus_the_velocity(case: Case) -> None:
    """At a timestep of 700 the network is told 0.3."""
    policy = case.policy
    x, timestep_B, words = asked(policy, case)
    captions = [e[m] for e, m in zip(words["embeds_BLD"], words["mask_BL"], strict=True)]
    with torch.no_grad():
        raw = case.pipeline.transformer(
            [one[:, None] for one in x], torch.tensor([0.3, 0.8]), captions, return_dict=False
        )[0]
        found = policy.family.predict(x, timestep_B, words)
    wanted = torch.stack([-one[:, 0] for one in raw])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_the_own_size_is_the_calls(case: Case) -> None:
    assert case.policy.drawn_size(Plan()) == (1024, 1024)
