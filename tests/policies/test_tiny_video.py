"""The shipped model of clips: plain diffusers loads it and draws the same clips, the verifier finds
what their captions claim, and something is left to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from rlalign.algorithms.reward_backprop import RewardBackprop
from rlalign.core.batches import PromptBatch
from rlalign.core.records import MEDIA, Plan, Space, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.data.prompts.motion import Motion
from rlalign.diffusion.rollout import rollout
from rlalign.policies.base import Policy
from rlalign.policies.tiny_video import ASSET, TinyVideo
from rlalign.rewards.base import score

HELD_OUT = Motion().held_out(64)
PLAN = Plan(steps=4, rule="flow_ode", eta=0.0, frames=9)


class Brightness:
    """The mean of the media, which it remembers."""

    spaces = MEDIA

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        self.seen.append(samples["media"])
        return {"total": samples["media"].flatten(1).mean(dim=1)}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return TinyVideo().load("cpu")


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
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".model"}
    assert sum(p.stat().st_size for p in files) < 5e6
    assert str(ASSET.parents[2]) not in "".join(p.read_text() for p in files if p.suffix == ".json")


@pytest.mark.parametrize("tokens", [16, 512])
def test_plain_diffusers_draws_the_same_clips(tokens: int) -> None:
    """Latents to 2e-6 relative, clips to one grey level."""
    from diffusers import DiffusionPipeline

    policy = TinyVideo(text_tokens=tokens).load("cpu")
    pipeline = DiffusionPipeline.from_pretrained(ASSET)
    pipeline.set_progress_bar_config(disable=True)
    unit = unit_of(2, PLAN)
    trajectory, media = rollout(policy, unit, 0)
    told = {
        "num_inference_steps": PLAN.steps,
        "guidance_scale": 1.0,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "max_sequence_length": tokens,
    }
    latents = torch.from_numpy(trajectory.latents_BK1[:, 0])
    clips = pipeline(list(unit.prompts), latents=latents, output_type="pt", **told).frames
    assert media.shape == (2, 9, 3, 32, 32)
    assert (clips * 255.0 - torch.from_numpy(media).float()).abs().max() < 0.5 + 0.1


def test_the_first_frames_are_decoded_alone_as_within_the_clip(policy: Policy) -> None:
    """5 of 9 frames are three of five latents; what four frames need is two, which are three."""
    latents = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = policy.decode(latents)
        for frames, decoded in ((5, 5), (4, 3), (1, 1)):
            part = policy.decode(policy.family.first_frames(latents, frames))
            assert part.shape[1] == decoded
            torch.testing.assert_close(part, whole[:, :decoded], rtol=0.0, atol=1e-6)


def test_a_reward_is_backpropagated_through_few_frames(policy: Policy) -> None:
    """The loss is what the first three frames alone say."""
    unit = unit_of(2, PLAN)
    scorer = Brightness()
    (one,) = PromptBatch(units=(unit,), scorer=scorer).passes(1, (0, 0))
    loss = RewardBackprop(frames=3).loss(one, policy)
    loss.value.backward()
    (media,) = scorer.seen
    assert media.shape == (2, 3, 3, 32, 32)
    _, drawn = rollout(policy, unit, 0)
    assert (media * 255.0 - torch.from_numpy(drawn[:, :3])).abs().max() < 0.5 + 0.1
    assert (
        sum(float(p.grad.abs().sum()) for p in policy.trainable().values() if p.grad is not None)
        > 0.0
    )
    policy.network.zero_grad(set_to_none=True)


@pytest.mark.promise
def test_held_out_captions_are_followed_and_something_is_left_to_learn(policy: Policy) -> None:
    """Eight ODE steps on 64 captions that no clip of the corpus shows:
    objects of the right kind move, otherwise than they should in many clips."""
    _, media = rollout(policy, unit_of(64, Plan(steps=8, rule="flow_ode", eta=0.0, frames=9)), 0)
    own = [text for _, text in HELD_OUT]
    reward = build("rewards", {"name": "motion"})
    live = reward.load("cpu")
    right = score(reward, live, media, own).mean()
    wrong = score(reward, live, media, own[1:] + own[:1]).mean()
    assert 0.4 < right < 0.7
    assert right > wrong + 0.2
    moved = build("rewards", {"name": "dynamic_degree"})
    assert np.all(score(moved, moved.load("cpu"), media, own) > 0.0)
