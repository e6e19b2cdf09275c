"""The quadratic cost, and what holds for every reward that sees latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import rlalign
from rlalign.core.registry import UserError, build
from rlalign.engine.local import LiveRewards
from rlalign.fitting.reward.settings import Simulate
from rlalign.rewards.base import score
from rlalign.voting.settings import Filter

LATENTS = torch.tensor([[[1.0, 2.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 1.0]]])
"""Two latents of two channels and two places."""


def quadratic(**settings: Any) -> Any:
    return build("rewards", {"name": "quadratic", **settings})


def test_it_is_the_sum_over_channels_and_places_and_a_sample_alone_scores_as_among_others() -> None:
    reward = quadratic(weights=(1.0, 0.5), target=(0.0, 1.0))
    scorer = reward.load("cpu")
    together = score(reward, scorer, LATENTS.numpy(), ["", ""])
    assert together.tolist() == [-(1.0 + 4.0 + 0.5 * (1.0 + 4.0)), 0.0]
    alone = [score(reward, scorer, LATENTS[i : i + 1].numpy(), [""])[0] for i in (0, 1)]
    assert together.tolist() == alone
    with pytest.raises(UserError, match=r"weights must be 1 number or 2, one for each channel"):
        quadratic(weights=(1.0, 1.0, 1.0)).load("cpu")(LATENTS, ["", ""])


def test_scores_and_gradients_of_latents_beside_those_of_media() -> None:
    """The total is the weighted sum, and each space has a gradient of its own, in closed form."""
    rewards = LiveRewards([quadratic(weight=2.0), build("rewards", {"name": "centroid"})])  # type: ignore[list-item]
    assert rewards.spaces() == {"media", "latent"}
    media = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples: Any = {"media": media, "latent": LATENTS}
    found = rewards.scores(samples, ["", ""])
    np.testing.assert_allclose(
        found.total_B, 2.0 * found.raw["quadratic"] + found.raw["centroid"], rtol=1e-6
    )
    _, pulls = rewards.gradient(samples, ["", ""])
    torch.testing.assert_close(pulls["latent"], -4.0 * LATENTS)
    alone = LiveRewards([build("rewards", {"name": "centroid"})])  # type: ignore[list-item]
    assert torch.equal(pulls["media"], alone.gradient({"media": media}, ["", ""])[1]["media"])


def test_load_reward_takes_latents() -> None:
    said = rlalign.load_reward("quadratic")
    latents = LATENTS.clone().requires_grad_()
    said(latents, ["", ""]).sum().backward()
    torch.testing.assert_close(latents.grad, -2.0 * LATENTS)
    with pytest.raises(UserError, match=r"latents must be floating point of shape \(B, \*latent\)"):
        said(torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8), ["", ""])


def test_where_there_are_only_media_it_is_refused(tmp_path: Path) -> None:
    """Frames, filters of pictures, people who are simulated, and requests over HTTP."""
    from rlalign.runtime.serving import ServeSettings, serve_reward

    with pytest.raises(UserError, match="frames has no meaning for quadratic, which sees latents"):
        quadratic(frames="mean")
    with pytest.raises(ValidationError, match="reward must see media: a picture that people are"):
        Filter(reward=quadratic(), least=0.0)
    with pytest.raises(ValidationError, match="utility must see media: a set of pairs has no"):
        Simulate(policy="tiny", utility=(quadratic(),))  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="reward must see media: a request over HTTP has no latents"
    ):
        serve_reward(quadratic(), ServeSettings(), address=None, on_ready=print)
