"""Denoising as a Gymnasium environment: sound, reproducible, and the same chain as rlalign's own
rollout."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from rlalign.alignment.environment import Denoising
from rlalign.core.media import as_uint8
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import rollout
from rlalign.policies.points import Points
from rlalign.rewards.centroid import Centroid
from tests.policies.clips import Clips
from tests.toy import make_units

PROMPTS = ("left", "right", "up", "down")


def environment(plan: Plan | None = None, **more: Any) -> Denoising:
    scorer = Centroid(x=0.2, y=0.2).load("cpu")
    policy = Points().load("cpu")
    plan = plan or Plan(steps=5, eta=1.0)
    return Denoising(
        policy, lambda media, prompts: scorer(media, prompts).numpy(), PROMPTS, plan, **more
    )


def test_gymnasiums_own_checker_is_content() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # latents have no bounds, and that is what these warnings are about; anything else fails
        for about in ("A Box .* minimum value is -infinity", "A Box .* maximum value is infinity"):
            warnings.filterwarnings("ignore", message=f".*{about}")
        warnings.filterwarnings(
            "ignore", message=".*recommend using a symmetric and normalized space"
        )
        check_env(environment(), skip_render_check=True)


def test_it_draws_the_latent_as_it_is() -> None:
    env = environment(render_mode="rgb_array")
    env.reset(options={"latent": np.array([1.2, 0.6], np.float32), "prompt": 1})
    picture = env.render()
    assert picture is not None
    assert (picture.shape, picture.dtype) == ((16, 16, 3), np.uint8)
    row, column = np.unravel_index(picture[..., 0].argmax(), (16, 16))
    assert (row, column) == (6, 11), "up and to the right"
    assert environment().render() is None
    frames = environment(render_mode="rgb_array_list")
    frames.reset(options={"latent": np.array([1.2, 0.6], np.float32), "prompt": 1})
    assert np.array_equal(frames.render(), [picture])


def test_of_a_clip_it_draws_every_frame() -> None:
    """On one sheet, or as a list, as gymnasium's modes say."""
    policy = Clips().load("cpu")
    plan = Plan(steps=3, rule="flow_sde", eta=0.7, height=16, width=24, frames=5)
    latent = np.random.default_rng(0).standard_normal(policy.latent_shape(plan), dtype=np.float32)
    drawn = as_uint8(policy.decode(torch.from_numpy(latent[None])))[0].transpose(0, 2, 3, 1)
    found = {}
    for mode in ("rgb_array", "rgb_array_list"):
        env = Denoising(policy, lambda *_: np.zeros(1), ["a ball"], plan, render_mode=mode)
        env.reset(options={"latent": latent, "prompt": 0})
        found[mode] = env.render()
    assert isinstance(found["rgb_array_list"], list) and len(found["rgb_array_list"]) == 5
    assert np.array_equal(found["rgb_array_list"], drawn)
    assert np.array_equal(found["rgb_array"], np.concatenate(drawn, axis=1))


def test_the_same_seed_is_the_same_episode() -> None:
    first, second = environment(), environment()
    for env in (first, second):
        env.action_space.seed(1)
    start, again = first.reset(seed=3), second.reset(seed=3)
    assert np.array_equal(start[0], again[0])
    assert start[1] == again[1]
    assert not np.array_equal(first.reset(seed=4)[0], start[0])


def test_an_episode_is_a_rollout() -> None:
    """The policy's Gaussian with the unit's noise as action: the latents of rlalign's rollout, to
    rounding of the batch."""
    env = environment()
    (unit,) = make_units(1, per_unit=3, plan=env.chain.plan)
    unit = unit.__class__(**{**unit.__dict__, "prompts": ("up", "left", "up")})
    trajectory, media = rollout(env.chain.policy, unit, 0)
    for row, prompt in enumerate(unit.prompts):
        latent = unit_noise(unit, 0, (2, 1, 1))[row]
        observation, _ = env.reset(
            options={"latent": latent.numpy(), "prompt": PROMPTS.index(prompt)}
        )
        reward, terminated, info = 0.0, False, {}
        for k in range(env.chain.decisions):
            assert not terminated
            with torch.no_grad():
                gaussian = env.chain.gaussian(torch.from_numpy(observation)[None])
            action = gaussian.sample(unit_noise(unit, k + 1, (2, 1, 1))[row][None])
            assert np.allclose(action[0], trajectory.latents_BK1[row, k + 1], atol=1e-5)
            observation, reward, terminated, _, info = env.step(action.flatten().numpy())
        assert terminated
        assert np.allclose(info["latent"], trajectory.latents_BK1[row, -1], atol=1e-5)
        picture = torch.from_numpy(media[row : row + 1]).float() / 255.0
        assert reward == pytest.approx(
            Centroid(x=0.2, y=0.2).load("cpu")(picture, [""]).item(), abs=5e-3
        )


def test_the_last_step_of_ddim_is_no_decision() -> None:
    assert environment(Plan(steps=7, eta=1.0)).chain.decisions in (6, 7)


@pytest.mark.parametrize("plan", [Plan(steps=5, eta=0.0), Plan(steps=5, eta=1.0, window=2)])
def test_a_plan_without_noise_in_every_step_is_refused(plan: Plan) -> None:
    with pytest.raises(
        UserError, match="every step but the last ones must have noise to be a decision"
    ):
        environment(plan)


def test_a_prompt_that_is_none_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"options\.prompt must be a prompt's number from 0 to 3, got 4"
    ):
        environment().reset(options={"prompt": 4})
