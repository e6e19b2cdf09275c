"""The policy of points against the closed form of its mixture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import rollout
from rlalign.policies.base import Policy
from rlalign.policies.points import MODES, SPREAD, Points


def policy() -> Policy:
    return Points().load("cpu")


def log_density(x_B2: torch.Tensor, words: list[str], alpha: float, sigma: float) -> torch.Tensor:
    """log p_t of the noised mixture, written out."""
    centres = torch.tensor([mode for word in words for mode in MODES[word]]).to(x_B2)
    variance = alpha**2 * SPREAD**2 + sigma**2
    squared = ((x_B2[:, None] - alpha * centres) ** 2).sum(-1)
    return torch.logsumexp(-squared / (2 * variance), 1) - math.log(
        len(centres) * 2 * math.pi * variance
    )


@pytest.mark.parametrize("prompt", ["left", "up", "left down", "nothing known"])
@pytest.mark.parametrize("level", [1, 250, 981])
def test_the_prediction_is_minus_sigma_times_the_score(prompt: str, level: int) -> None:
    one = policy()
    words = [w for w in prompt.split() if w in MODES] or list(MODES)
    alpha, sigma = (float(f(torch.tensor(level))) for f in (one.path.alpha, one.path.sigma))
    x = torch.randn(16, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(log_density(x.flatten(1), words, alpha, sigma).sum(), x)
    condition = one.encode([prompt] * 16)
    found = one.family.predict(x, torch.full((16,), level), condition.caption)
    assert torch.allclose(found, -sigma * score, rtol=0, atol=1e-6)


def test_sampling_comes_to_the_mixtures_moments() -> None:
    """The probability-flow ODE in 250 steps, 4,000 samples: means and standard deviations within
    0.03."""
    unit = Unit(
        key=UnitKey("train", 1, 0),
        prompts=("right",) * 4000,
        prompt_ids=(0,) * 4000,
        sample_ids=tuple(range(4000)),
        seed=0,
        plan=Plan(steps=250, eta=0.0),
    )
    trajectory, media = rollout(policy(), unit, 0)
    points = torch.from_numpy(trajectory.latents_BK1[:, -1]).reshape(-1, 2)
    assert points.mean(0).tolist() == pytest.approx([1.2, 0.0], abs=0.03)
    assert points.std(0).tolist() == pytest.approx([SPREAD, math.hypot(0.6, SPREAD)], abs=0.03)
    assert media.shape == (4000, 1, 3, 16, 16)


def test_pictures_are_read_back() -> None:
    points = torch.tensor([[1.2, -0.6], [0.0, 0.0], [-0.6, 1.2]])[:, :, None, None]
    one = policy()
    assert torch.allclose(one.encode_media(one.decode(points)), points, atol=2e-3)


def test_a_trained_one_is_saved_and_read(tmp_path: Path) -> None:
    one = policy()
    torch.nn.init.normal_(one.network.outer.weight)  # type: ignore[arg-type,union-attr]
    one.save(tmp_path)
    again = Points(path=str(tmp_path)).load("cpu")
    for name, weight in one.weights().items():
        assert torch.equal(again.weights()[name], weight)
        assert torch.equal(again.reference[name], weight)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="policy.path must be a folder that a run of points"):
        Points(path=str(tmp_path)).load("cpu")
