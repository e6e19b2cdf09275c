"""Pretraining of a planner: its corpus, its loss, and resuming bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import MAZES, is_free, to_points
from rlalign.fitting.denoiser import Pretrain, pretrain
from rlalign.fitting.denoiser.plans import demonstrations, plan_denoiser, plan_loss
from rlalign.networks.plan_denoiser import PlanDenoiser

SMALL = {
    "seed": 3,
    "task": "mazes",
    "mazes": ("umaze", "medium"),
    "horizon": 8,
    "images": 12,
    "denoiser": {"family": "planner", "updates": 4, "batch": 4, "width": 16, "layers": 2},
    "checkpoint_every": 3,
}


class Stopped(Exception):
    """What stands for a power cut."""


def settings(**changes: object) -> Pretrain:
    return Pretrain.model_validate({**SMALL, **changes})


def run(out: Path, stop: int = 0) -> dict[str, torch.Tensor]:
    def progress(stage: str, done: int, total: int, loss: float) -> None:
        if done == stop:
            raise Stopped

    folder = pretrain(settings(out=out), progress=progress)
    return PlanDenoiser.read(folder).state_dict()


def test_the_corpus_holds_plans_of_each_maze() -> None:
    plans_N2H, maze_N = demonstrations(settings())
    assert plans_N2H.shape == (12, 2, 8)
    for number, name in ((0, "umaze"), (1, "medium")):
        own = plans_N2H[maze_N == number]
        assert len(own) == 6
        assert is_free(MAZES[name], to_points(own.double().numpy(), MAZES[name]), 0.2).all()


def test_the_loss_of_a_silent_network_is_the_noise_between_the_ends() -> None:
    """Whose variance is 1: six of eight way points count. 64 x 12 numbers, to four standard
    errors."""
    config = settings(denoiser={**SMALL["denoiser"], "batch": 64})
    loss = plan_loss(plan_denoiser(config), demonstrations(config), config)
    first, again, other = (loss(update).item() for update in (0, 0, 1))
    assert first == pytest.approx(6 / 8, abs=4 * (2 / 768) ** 0.5)
    assert first == again != other


def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "again", stop=4)
    again = run(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    first = plan_denoiser(settings()).state_dict()
    assert not torch.equal(whole["first.weight"], first["first.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": {}}, "autoencoder has no meaning where the task is mazes"),
        ({"denoiser": {}}, "denoiser.family must be planner where the task is mazes, got unet"),
        ({"misspelt": 0.5}, "misspelt has no meaning where the task is mazes"),
        (
            {"denoiser": {"family": "planner", "text_width": 8}},
            "text_width is no setting of family planner",
        ),
        ({"mazes": ("ring",)}, "Input should be 'umaze', 'medium' or 'large'"),
        ({"horizon": 2}, "greater than or equal to 3"),
    ],
)
def test_settings_of_another_task_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises((ValidationError, UserError), match=message):
        settings(**changes)


@pytest.mark.parametrize("field", ["horizon", "mazes"])
def test_settings_of_plans_are_refused_elsewhere(field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} has no meaning where the task is shapes"):
        Pretrain.model_validate({field: SMALL[field]})
