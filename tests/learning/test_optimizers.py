"""Optimisers against closed forms and diffusers' own schedule; their state and its bytes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError, build
from rlalign.learning.optimizers.adafactor import Adafactor
from rlalign.learning.optimizers.base import Optimizer, pack_state, unpack_state
from rlalign.learning.settings import LearnerSettings
from tests.learning.test_learner import learner_of, same, train_round, trained
from tests.runs import points_run
from tests.toy import ToyPolicy

SHAPES = {"vector": (5,), "matrix": (4, 3), "kernel": (3, 2, 3, 3)}


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return {
        n: torch.nn.Parameter(torch.randn(s, generator=source).double()) for n, s in SHAPES.items()
    }


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=source).double() * 10.0**step


def step(optimiser: torch.optim.Optimizer, values: dict[str, torch.nn.Parameter], n: int) -> None:
    for parameter in values.values():
        parameter.grad = gradient(tuple(parameter.shape), n).to(parameter.dtype)
    optimiser.step()


def test_adafactor_is_the_papers_with_a_rate_of_its_own() -> None:
    """Shazeer & Stern 2018 (arXiv:1804.04235), algorithms 4 and 5 with alpha = lr and
    beta2_t = 1 - t^-0.8: rows and columns of means, updates clipped to a root mean square of 1,
    decoupled decay; float64, relative 1e-12."""
    lr, decay = 1e-2, 0.1
    values = parameters()
    wanted = {n: p.detach().numpy().copy() for n, p in values.items()}
    optimiser = Adafactor(weight_decay=decay).build([{"params": list(values.values())}], lr)
    rows: dict[str, Any] = dict.fromkeys(SHAPES, 0.0)
    columns: dict[str, Any] = dict.fromkeys(SHAPES, 0.0)
    for t in (1, 2, 3):
        step(optimiser, values, t)
        for name, shape in SHAPES.items():
            found = gradient(shape, t).numpy()
            square = found**2 + 1e-30
            new = t**-0.8
            if name == "vector":
                rows[name] = (1 - new) * rows[name] + new * square
                second = rows[name]
            else:
                rows[name] = (1 - new) * rows[name] + new * square.mean(-1)
                columns[name] = (1 - new) * columns[name] + new * square.mean(-2)
                whole = rows[name].mean(-1)[..., None, None]
                second = rows[name][..., :, None] * columns[name][..., None, :] / whole
            update = found / np.sqrt(second)
            update /= max(1.0, np.sqrt((update**2).mean()))
            wanted[name] = wanted[name] * (1 - lr * decay) - lr * update
    for name, parameter in values.items():
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name], rtol=1e-12)


def test_warm_up_is_the_schedule_of_diffusers() -> None:
    """constant_with_warmup, as the published trainers have it, and none where it is 0."""
    from diffusers.optimization import get_scheduler

    settings = LearnerSettings(lr=0.5, warmup=4)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler("constant_with_warmup", optimiser, num_warmup_steps=4)
    for update in range(8):
        assert settings.lr * settings.share_of_rate(update) == schedule.get_last_lr()[0]
        optimiser.step()
        schedule.step()
    assert [LearnerSettings().share_of_rate(n) for n in (0, 1, 100)] == [1.0, 1.0, 1.0]


def test_a_learner_warms_its_rates_up_and_scales_them() -> None:
    """Two updates a round: rates of 0, 1/4, ... of lr; the guard's factor multiplies them."""
    learner = learner_of(ToyPolicy(), lr=0.5, warmup=4)
    before = learner.policy.weights()
    rates = []
    step = learner.optimiser.step

    def spy() -> None:
        rates.append([group["lr"] for group in learner.optimiser.param_groups])
        step()

    learner.optimiser.step = spy  # type: ignore[method-assign]
    train_round(learner, 1)
    learner.scale_rate(0.5)
    train_round(learner, 2)
    train_round(learner, 3)
    assert rates == [[0.0, 0.0], [0.125, 0.125], [0.125, 0.25], [0.1875, 0.375], *[[0.25, 0.5]] * 2]
    assert any(not torch.equal(t, before[n]) for n, t in learner.policy.weights().items())
    # the first update alone, of rate 0, moves nothing
    still = learner_of(ToyPolicy(), updates_per_round=1, warmup=4)
    train_round(still, 1)
    assert all(torch.equal(t, before[n]) for n, t in still.policy.weights().items())


def test_adafactor_trains_and_keeps_less() -> None:
    one, other = trained(), trained(optimizer={"name": "adafactor"})
    assert all(
        not torch.equal(t, other.base_weights().tensors[n])
        for n, t in other.policy.weights().items()
    )
    state = other.state_dict()
    assert state["optimiser/step/inner.weight"] == 6
    assert state["optimiser/exp_avg_sq_row/inner.weight"].shape == (16,)
    assert state["optimiser/exp_avg_sq_col/inner.weight"].shape == (8,)
    assert "optimiser/exp_avg/inner.weight" not in state
    assert sum(t.numel() for t in state.values()) < sum(
        t.numel() for t in one.state_dict().values()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_8bit"])
def test_its_state_goes_on_to_the_last_bit_and_has_the_bytes_that_are_said(optimizer: str) -> None:
    """bitsandbytes computes on CPUs too, which rlalign does not offer; where it is installed its
    state is looked at here."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    settings: Any = build("optimizers", {"name": optimizer})
    large = {"large": torch.nn.Parameter(torch.randn(70, 100))}
    kept = {n: torch.nn.Parameter(p.float()) for n, p in parameters().items()} | large
    optimiser = settings.build([{"params": list(kept.values())}], 1e-4)
    step(optimiser, kept, 1)
    packed = {n: t.clone() for n, t in pack_state(optimiser, kept).items()}
    size = sum(t.nbytes for n, t in packed.items() if t.ndim and not n.startswith("qmap"))
    assert settings.bytes_of_state(list(kept.values())) == size
    again = {n: torch.nn.Parameter(p.detach().clone()) for n, p in kept.items()}
    resumed = settings.build([{"params": list(again.values())}], 1e-4)
    unpack_state(resumed, again, packed)
    for values, one in ((kept, optimiser), (again, resumed)):
        step(one, values, 2)
    assert all(torch.equal(again[n], kept[n]) for n in kept)
    mine, yours = pack_state(optimiser, kept), pack_state(resumed, again)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[n], yours[n]) for n in mine)


def test_8_bits_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run file says so before anything starts, the learner where it is; what is not installed is
    said by the machine that needs it."""
    named = {"name": "adamw_8bit"}
    message = r"learner\.optimizer adamw_8bit needs a CUDA device, got 'cpu'; set runtime\.device"
    with pytest.raises(UserError, match=message):
        points_run("learner.optimizer.name=adamw_8bit")
    with pytest.raises(UserError, match=message):
        learner_of(ToyPolicy(), optimizer=named)
    run = points_run("learner.optimizer.name=adamw_8bit", "runtime.device=cuda")
    assert run.learner.optimizer.name == "adamw_8bit"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes \(.*\); install rlalign\[8bit\]"):
        run.learner.optimizer.refuse_missing()
    Adafactor().refuse_missing()


class Momentum(Optimizer):
    """SGD with momentum, torch's: an optimiser that is kept outside of rlalign."""

    momentum: float = 0.9

    def build(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([dict(group) for group in groups], lr=lr, momentum=self.momentum)


def test_an_optimiser_of_ones_own_trains_and_goes_on_to_the_last_bit() -> None:
    """SGD's first update by hand: the rate times the gradient, clipped to a norm of 1."""
    named = {"name": f"{__name__}:Momentum", "momentum": 0.5}
    run = points_run(f"learner.optimizer={named}")
    assert run.learner.optimizer == Momentum(momentum=0.5)
    once = trained(1, lr=0.1, optimizer=named, updates_per_round=1, max_grad_norm=1e-3)
    moved = [t - once.base_weights().tensors[n] for n, t in once.policy.weights().items()]
    norm = torch.cat([one.flatten() for one in moved]).norm()
    assert norm.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    straight, stopped = (trained(n, optimizer=named) for n in (2, 1))
    state = {n: t.clone() for n, t in stopped.state_dict().items()}
    assert "optimiser/momentum_buffer/inner.weight" in state
    resumed = learner_of(ToyPolicy(seed=5), optimizer=named)
    resumed.load_state_dict(state)
    train_round(resumed, 2)
    assert same(resumed, straight)
