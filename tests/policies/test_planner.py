"""The planner: ends that are held at every step, and the shipped one, which plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlalign
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.dpok import DPOK
from rlalign.core.prompts import Prompt
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError, build
from rlalign.data.mazes.maps import MAZES
from rlalign.data.mazes.tasks import Task
from rlalign.diffusion.rollout import rollout
from rlalign.networks.plan_denoiser import PlanDenoiser
from rlalign.policies.base import Policy
from rlalign.policies.planner import Planner
from rlalign.policies.tiny_planner import ASSET, TinyPlanner
from tests.toy import collect

TASKS = [
    Task(maze=MAZES["umaze"], start=(-1.0, 0.9), goal=(-1.1, -1.0)),
    Task(maze=MAZES["umaze"], start=(1.1, -0.1), goal=(-0.9, 1.0)),
]
PROMPTS = [task.prompt for task in TASKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with random weights, whose last layer is not zero."""
    torch.manual_seed(0)
    network = PlanDenoiser(horizon=9, width=8, blocks=2)
    torch.nn.init.normal_(network.last.weight, std=0.5)
    made = tmp_path_factory.mktemp("planner")
    network.save(made)
    return made


def load(folder: Path, **settings: Any) -> Policy:
    return Planner(path=str(folder), **settings).load("cpu")


def unit(**plan: Any) -> Unit:
    rows = [(number, prompt, 0) for number, prompt in enumerate(PROMPTS)]
    return Unit.of_rows(UnitKey("train", 1, 0), rows, 0, Plan(**plan))


@pytest.mark.parametrize("plan", [{"eta": 1.0}, {"eta": 0.0}, {"rule": "ddpm"}])
def test_every_plan_begins_at_its_start_and_ends_at_its_goal(
    folder: Path, plan: dict[str, Any]
) -> None:
    trajectory, media = rollout(load(folder), unit(steps=7, **plan), 0)
    last_B2H = trajectory.latents_BK1[:, -1]
    ends_B22 = np.array([[task.start, task.goal] for task in TASKS]) / MAZES["umaze"].scale
    assert last_B2H.shape == (2, 2, 9)
    np.testing.assert_allclose(last_B2H[:, :, [0, -1]].swapaxes(1, 2), ends_B22, atol=1e-5)
    assert media.shape == (2, 1, 3, 64, 64)


def test_held_ends_have_the_right_noise_at_every_step(folder: Path) -> None:
    """Their marginal at a level is N(alpha end, sigma^2), by 400 samples to four standard
    errors."""
    many = Unit.of_rows(
        UnitKey("train", 1, 0), [(0, PROMPTS[0], s) for s in range(400)], 0, Plan(steps=5)
    )
    policy = load(folder)
    trajectory, _ = rollout(policy, many, 0)
    end_2 = np.array(TASKS[0].start) / MAZES["umaze"].scale
    levels = policy.path.levels(5)
    for k in range(1, 5):
        alpha, sigma = (float(f(levels[k])) for f in (policy.path.alpha, policy.path.sigma))
        noise_B2 = (trajectory.latents_BK1[:, k, :, 0] - alpha * end_2) / sigma
        np.testing.assert_allclose(noise_B2.mean(axis=0), 0.0, atol=4 / 400**0.5)
        np.testing.assert_allclose(noise_B2.var(axis=0), 1.0, atol=4 * (2 / 400) ** 0.5)


def test_what_is_predicted_at_the_ends_does_not_depend_on_the_weights(folder: Path) -> None:
    policy = load(folder)
    condition = policy.encode(PROMPTS)
    x = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(1))
    found = policy.family.predict(x, torch.tensor([600, 20]), condition.caption)
    for part, is_free in ((found[:, :, [0, -1]], False), (found[:, :, 1:-1], True)):
        gradients = torch.autograd.grad(
            part.square().sum(),
            list(policy.network.parameters()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        assert any(bool(g.any()) for g in gradients) == is_free


def test_a_plan_does_not_depend_on_its_neighbours(folder: Path) -> None:
    policy = load(folder)
    x = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([500, 500])
    together = policy.family.predict(x, times, policy.encode(PROMPTS).caption)
    alone = policy.family.predict(x[1:], times[1:], policy.encode(PROMPTS[1:]).caption)
    torch.testing.assert_close(alone, together[1:])


def test_prompts_of_another_maze_or_without_a_record_are_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match="policy.maze must be the maze of the prompts, got 'medium'"
    ):
        load(folder, maze="medium").encode(PROMPTS)
    with pytest.raises(UserError, match="must have a record with maze, start and goal"):
        load(folder).encode([Prompt("a red circle")])


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize(
    "plan", [{}, {"window": 2, "window_place": "end", "min_std": 0.02}], ids=["all", "the last"]
)
def test_the_ratio_is_exactly_one_before_the_first_update(
    folder: Path, lora_rank: int, plan: dict[str, Any]
) -> None:
    """With a value network that reads the ends, and with an adapter whose matrices are not zero."""
    policy = load(folder, lora_rank=lora_rank)
    if lora_rank:
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(0.1)
    given = unit(steps=4, **plan)
    scored = collect(policy, [given])
    algorithm = DPOK(advantage="global", value_lr=1e-3)
    found = algorithm.critic(policy, given.plan)
    assert found is not None
    passes = list(algorithm.make_batch(scored, Memory()).passes(1))
    assert len(passes) == (2 if plan else 3)
    for one in passes:
        loss = algorithm.loss(one, policy, critic=found[0])
        assert loss.maxima["ratio/max_deviation"].item() == 0.0


def test_an_adapter_is_in_what_is_saved(folder: Path, tmp_path: Path) -> None:
    policy = load(folder, lora_rank=2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    policy.save(tmp_path)
    x, words = torch.randn(2, 2, 9), policy.encode(PROMPTS).caption
    asked = (x, torch.tensor([600, 20]), words)
    with torch.no_grad():
        found = load(tmp_path).answer(*asked)
        torch.testing.assert_close(found, policy.answer(*asked), atol=1e-4, rtol=1e-4)
        assert (found - load(folder).answer(*asked)).abs().max() > 1e-2


def test_a_saved_planner_is_read_again_and_a_damaged_one_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    policy = load(folder)
    policy.family.save(tmp_path / "saved")
    again = load(tmp_path / "saved").weights()
    assert all(torch.equal(tensor, again[name]) for name, tensor in policy.weights().items())
    (tmp_path / "saved" / "denoiser.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"policy.path must be a folder with a planner's config"):
        load(tmp_path / "saved")
    with pytest.raises(UserError, match=r"policy.path must be a folder .*nowhere"):
        load(tmp_path / "nowhere")


def test_a_plan_is_drawn_on_its_map(folder: Path) -> None:
    """Walls are grey, and a plan that stands still is one spot at its place."""
    family = load(folder).family
    latents = torch.zeros(1, 2, 9)
    latents[:, 0] = 1.0 / MAZES["umaze"].scale
    picture_3HW = family.decode(latents)[0, 0]
    pixel = 5.0 / 64
    assert picture_3HW[:, 2, 2].tolist() == pytest.approx([0.3] * 3)
    assert picture_3HW[:, round(1.5 / pixel), round(1.5 / pixel)].tolist() == pytest.approx(
        [0.0] * 3
    )
    bright_HW = picture_3HW.amax(dim=0)
    row, column = divmod(int(bright_HW.argmax()), 64)
    assert (column * pixel - 2.5, 2.5 - row * pixel) == pytest.approx((1.0, 0.0), abs=0.1)


def test_the_shipped_planner_is_small_and_reaches_its_goals() -> None:
    """One plan for each of 32 starts and goals that it was not trained on, in 10 steps: over 80 %
    arrive, and about half keep to either side of the turn."""
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 2_000_000
    source: Any = build("prompts", {"name": "mazes", "apart": 4})
    prompts = [prompt for _, prompt in source.held_out(32)]
    policy = TinyPlanner().load("cpu")
    latents = policy.sample(prompts, steps=10, eta=1.0, seed=0, output="latents")
    assert float(rlalign.load_reward("reach")(latents, prompts).mean()) > 0.8
    safe = float(rlalign.load_reward("detour", x=0.5, y=0.0)(latents, prompts).mean())
    assert 0.2 < safe < 0.8
