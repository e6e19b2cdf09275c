"""Compiled blocks and channels-last weights: the learner's numbers are the rollout's, what is read
and written stays, and a machine that cannot compile says so. torch.compile is real, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.algorithms._advantages import PromptStatistics
from rlalign.algorithms.ddpo import DDPO
from rlalign.alignment.loop import train_local
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.networks import compilation
from rlalign.policies.base import Policy
from tests.runs import small_run
from tests.toy import ToyFamily, ToyNetwork, ToyPolicy, collect, make_units

PLAN = Plan(steps=2, eta=1.0, guidance=2.0)


def loaded(name: str = "tiny", **settings: Any) -> Policy:
    recipe: Any = build("policies", {"name": name, **settings})
    return recipe.load("cpu")


def answer(policy: Policy, rows: int = 2) -> torch.Tensor:
    """What a policy's denoiser says of a fixed latent."""
    x = torch.randn(rows, *policy.latent_shape(Plan()), generator=torch.Generator().manual_seed(0))
    condition = policy.encode(["a red circle above a blue square"] * rows)
    return policy.denoise(x, policy.path.levels(10)[4], condition, 2.0)[1]


def first_ratio(policy: Policy, plan: Plan = PLAN, lanes: int = 1) -> float:
    """max |ratio - 1| before the first update of a run with this policy, as its learner measures
    it; an update is made with it."""
    scored = collect(policy, make_units(lanes, per_unit=2, plan=plan))
    algorithm: Any = DDPO(advantage="global")
    settings = LearnerSettings(lr=1e-4, shards=lanes, updates_per_round=1)
    learner = Learner(policy, algorithm.loss, settings, seed=0)
    return learner.update(algorithm.make_batch(scored, PromptStatistics()), round=1)[
        "ratio/first_update"
    ]


# --- channels last --------------------------------------------------------------------------------


@pytest.mark.promise
def test_channels_last_changes_the_layout_and_no_weight(tmp_path: Path) -> None:
    """What travels and what is written is as without it, and the ratio is exactly 1."""
    plain = loaded()
    policy = loaded(channels_last=True)
    first = policy.trainable()["conv_in.weight"]
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not first.is_contiguous()
    for name, weight in policy.weights().items():
        assert weight.is_contiguous()
        assert torch.equal(weight, plain.weights()[name])
    with torch.no_grad():
        torch.testing.assert_close(answer(policy), answer(plain), rtol=1e-4, atol=1e-5)
        scored = collect(policy, make_units(1, per_unit=1, plan=Plan(steps=1, eta=1.0)))
        algorithm: Any = DDPO(advantage="global")
        (one,) = algorithm.make_batch(scored, PromptStatistics()).passes(1)
        assert algorithm.loss(one, policy).maxima["ratio/max_deviation"].item() == 0.0

    policy.set_weights(plain.weights())
    policy.save(tmp_path / "saved")
    again = loaded(path=str(tmp_path / "saved"))
    for name, weight in again.weights().items():
        assert torch.equal(weight, plain.weights()[name])
    assert not first.is_contiguous(), "saving leaves it as it was"


# --- what is compiled -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("tiny", {"BasicTransformerBlock", "ResnetBlock2D"}),
        ("tiny_flow", {"JointTransformerBlock"}),
        ("tiny_video", {"WanTransformerBlock"}),
    ],
)
def test_the_blocks_that_repeat_are_compiled(name: str, classes: set[str]) -> None:
    network = loaded(name).network
    blocks = compilation.blocks_to_compile(network)
    assert {type(block).__name__ for block in blocks} == classes
    names = list(network.state_dict())
    compilation.compile_blocks(network)
    assert compilation.is_compiled(network)
    assert list(network.state_dict()) == names
    assert not compilation.is_compiled(loaded(name).network)


def test_a_replica_is_compiled_too_and_a_copy_for_other_numbers_is_not() -> None:
    policy = loaded()
    compilation.compile_blocks(policy.network)
    assert compilation.is_compiled(policy.replica().network)
    assert not compilation.is_compiled(policy.in_precision(torch.float64).network)


def test_a_network_without_blocks_says_so() -> None:
    with pytest.raises(UserError, match=r"policy\.compile must be false for Linear"):
        compilation.compile_blocks(torch.nn.Linear(1, 1))


def test_a_spread_denoiser_is_not_compiled() -> None:
    recipe: Any = build("policies", {"name": "tiny_flow", "compile": True, "lora_rank": 2})
    with pytest.raises(UserError, match=r"policy\.compile must be false where the denoiser"):
        recipe.load_spread("cpu", frozenset({"denoiser"}), None, trained=True)


@pytest.mark.promise
def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    """In a process of its own: torch remembers what it found."""
    code = (
        "from rlalign.networks.compilation import try_compiler\n"
        "from rlalign.core.registry import UserError\n"
        "try:\n    try_compiler('cpu')\nexcept UserError as error:\n    print(error)\n"
    )
    scene = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **scene},
        check=True,
    )
    said = done.stdout.strip()
    assert said.startswith("policy.compile must be false here: torch cannot compile the denoiser")
    assert "No working C++ compiler" in said
    assert "install what it compiles with, a C++ compiler (g++)" in said
    assert len(said.splitlines()) == 1


# --- its numbers ----------------------------------------------------------------------------------


class BlockNetwork(ToyNetwork):
    """The toy's network with a block in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())]
        )

    def forward(
        self, x: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor
    ) -> torch.Tensor:
        inner = self.blocks[0](x.flatten(1)).reshape(x.shape)
        return super().forward(x, timestep_B, embeds_BLD) + inner


class BlockFamily(ToyFamily):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = BlockNetwork().eval()


class BlockPolicy(ToyPolicy):
    kind = BlockFamily


def test_a_thread_compiles_for_more_shapes_than_torch_would_and_then_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch keeps its limits per thread, and beyond them it goes on uncompiled."""
    monkeypatch.setattr(compilation, "SETTINGS", {"dynamic": False, "backend": "eager"})
    monkeypatch.setattr(compilation, "SHAPES", 12)
    policy = BlockPolicy()
    compilation.compile_blocks(policy.network)

    def asked(rows: int) -> torch.Tensor:
        with torch.no_grad():
            return answer(policy, rows)

    with ThreadPoolExecutor(1) as thread:
        found = list(thread.map(asked, range(1, 13)))
        with pytest.raises(UserError, match=r"policy\.compile must be false here"):
            thread.submit(asked, 13).result()
    plain = BlockPolicy()
    for rows, one in enumerate(found, start=1):
        assert torch.equal(one, answer(plain, rows).detach())


@pytest.mark.promise
def test_compiled_rollouts_and_learners_have_a_ratio_of_one() -> None:
    """Within what the check of a run allows for a clip range of 1e-4, on two lanes."""
    policy = BlockPolicy()
    compilation.compile_blocks(policy.network)
    policy.warm_up(PLAN, 2)
    assert policy.meter.calls == 0
    with torch.no_grad():
        torch.testing.assert_close(answer(policy), answer(BlockPolicy()), rtol=1e-5, atol=1e-6)
    assert first_ratio(policy, lanes=2) <= 1e-5


def coarse(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
    """A compiler whose code for gradients answers a hundredth more than its code without them."""
    more = 1.01 if torch.is_grad_enabled() else 1.0
    return lambda *inputs: [more * one for one in graph(*inputs)]


@pytest.mark.promise
def test_a_run_refuses_a_compiler_whose_gradients_are_of_other_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rollouts compile without gradients and the learner with them: the check of the ratio ends the
    run before its first update, and names the setting."""
    settings = (
        "policy={name: tiny, compile: true}",
        "rewards=[{name: jpeg}]",
        "rounds=1",
        "plan.steps=2",
        "learner.shards=1",
        "runtime.rollout.workers=1",
    )
    monkeypatch.setattr(compilation, "SETTINGS", {"dynamic": False, "backend": coarse})
    with pytest.raises(UserError, match=r"before the first update must be <= .* set .*") as told:
        train_local(small_run(*settings), tmp_path / "run", resume=False, on_record=lambda _: None)
    assert "policy.compile to false, or widen the clip range" in str(told.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny_flow"])
def test_a_compiled_pipeline_learns_as_an_uncompiled_one(name: str, tmp_path: Path) -> None:
    """A ratio of 1 as above, its gradient with an adapter and with activations that are computed
    twice, and the adapter's file."""
    rule = {"rule": "flow_sde", "eta": 0.7} if name == "tiny_flow" else {"eta": 1.0}
    found = []
    for settings in ({}, {"compile": True, "gradient_checkpointing": True}):
        policy = loaded(name, lora_rank=2, **settings)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        answer(policy).square().mean().backward()
        gradients = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
        found.append(torch.cat([g.flatten() for g in gradients.values()]))
        policy.save(tmp_path / str(len(found)))
        policy.network.zero_grad()
        deviation = first_ratio(policy, Plan(steps=2, guidance=2.0, **rule))
        assert deviation <= (1e-5 if settings else 0.0)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
    first, second = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("1", "2"))
    assert first == second
