"""Whole chains as one function of their noises: values and gradients, with one step's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from rlalign.core.records import Unit
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.diffusion.rollout import schedule_of
from rlalign.engine.base import Rewards, Work
from rlalign.engine.pieces import reward_gradient, see
from rlalign.policies.base import Policy

# --- any sampler, by checkpointing ---------------------------------------------------------------


class Pulled(NamedTuple):
    """The reward of a chain's end, and its gradient with respect to the chain's noises."""

    total_B: np.ndarray
    gradient: torch.Tensor
    clean: torch.Tensor
    """(B, C, H, W) where the chain ended."""


@dataclass(frozen=True, kw_only=True)
class ChainGradient(Work):
    """d reward / d noises through the whole chain of the plan; every step is computed again on the
    way back.

    ``noises`` (B, N, C, H, W): x_T and, with N = steps + 1, the noise of every step (else steps
    take none).
    """

    noises: torch.Tensor

    def do(self, policy: Policy, rewards: Rewards) -> Pulled:
        meter = policy.meter
        before = meter.backward_calls
        with torch.enable_grad():
            noises = self.noises.to(policy.device).detach().requires_grad_()
            clean = run_chain(policy, self.unit, noises)
            total_B, gradient = reward_gradient(policy, rewards, clean, self.unit.prompts, noises)
        # every step was asked twice, and gone back through once
        meter.backward_calls = before + (meter.backward_calls - before) // 2
        return Pulled(total_B, gradient.cpu(), clean.detach().cpu())


@dataclass(frozen=True, kw_only=True)
class ChainEnd(Work):
    """Where the chain of these noises ends, without a gradient."""

    noises: torch.Tensor

    @torch.no_grad()
    def do(self, policy: Policy, rewards: Rewards) -> torch.Tensor:
        return run_chain(policy, self.unit, self.noises.to(policy.device)).cpu()


def run_chain(policy: Policy, unit: Unit, noises: torch.Tensor) -> torch.Tensor:
    """The clean latents that noises (B, N, ...) lead to; N is 1 or steps + 1."""
    schedule = schedule_of(policy.path, unit)

    def one_step(x: torch.Tensor, k: int, z: torch.Tensor | None) -> torch.Tensor:
        gaussian = see(policy, unit, schedule, k, x).gaussian
        return gaussian.mean if z is None else gaussian.sample(z)

    x = noises[:, 0]
    for k in range(unit.plan.steps):
        z = noises[:, k + 1] if noises.shape[1] > 1 and bool(schedule.stochastic_K[k]) else None
        if torch.is_grad_enabled():
            x = checkpoint(one_step, x, k, z, use_reentrant=False)  # type: ignore[assignment]
        else:
            x = one_step(x, k, z)
    return x


# --- EDICT: a pair of chains that runs backwards exactly -----------------------------------------


class Pair(NamedTuple):
    """The two coupled latents."""

    x: torch.Tensor
    y: torch.Tensor

    def swapped(self) -> Pair:
        return Pair(self.y, self.x)


class Edict:
    """The coupled steps of EDICT on a policy's path, from noise to data and back, in float64 or
    float32.

    A step takes x <- a x + b e(y), then y <- a y + b e(new x) (x and y change places every other
    step), then mixes x <- p x + (1 - p) y and y <- (1 - p) new x + p y, one after the other.
    Variance-preserving: e is the noise and a, b are DDIM's; flow: e is the velocity, a = 1 and b
    the change of level, so that pure noise needs no division by alpha = 0.

    Source: Wallace 2022, arXiv:2211.12446, equations 12 to 15.
    """

    def __init__(
        self, policy: Policy, unit: Unit, *, p: float, dtype: torch.dtype, alternate: bool = True
    ) -> None:
        self.policy = policy.in_precision(dtype)
        self.p = p
        self.alternate = alternate
        self.steps = unit.plan.steps
        self.guidance = unit.plan.guidance
        self.levels = policy.path.at(unit.plan).levels(unit.plan.steps)
        self._refuse_no_signal()
        self.condition = policy.encode(unit.prompts, unit.plan).to(dtype=dtype)
        self.dtype = dtype

    def _refuse_no_signal(self) -> None:
        path = self.policy.path
        first = self.levels[0]
        if not isinstance(path, RectifiedFlow) and float(path.alpha(first)) == 0.0:
            raise UserError(
                "sampler: coupled chains need a signal at the first noise level, and at timestep"
                f" {first:.0f} the policy's has none (zero terminal SNR); take another sampler"
            )

    def _e(self, x: torch.Tensor, k: int) -> torch.Tensor:
        clean, noise = self.policy.denoise(x, self.levels[k], self.condition, self.guidance)
        return noise - clean if isinstance(self.policy.path, RectifiedFlow) else noise

    def _factors(self, k: int) -> tuple[float, float]:
        path = self.policy.path
        now = self.levels[k]
        then = self.levels[k + 1]
        if isinstance(path, RectifiedFlow):
            return 1.0, float(then - now)
        a = float(path.alpha(then) / path.alpha(now))
        return a, float(path.sigma(then)) - a * float(path.sigma(now))

    def down(self, pair: Pair, k: int) -> Pair:
        """Step ``k``, towards the data."""
        (a, b) = self._factors(k)
        p = self.p
        turned = self.alternate and k % 2 == 1
        x, y = pair.swapped() if turned else pair
        x = a * x + b * self._e(y, k)
        y = a * y + b * self._e(x, k)
        x, y = Pair(x, y).swapped() if turned else Pair(x, y)
        x = p * x + (1.0 - p) * y
        return Pair(x, (1.0 - p) * x + p * y)

    def up(self, pair: Pair, k: int) -> Pair:
        """The exact inverse of ``down``."""
        (a, b) = self._factors(k)
        p = self.p
        x, y = pair
        y = (y - (1.0 - p) * x) / p
        x = (x - (1.0 - p) * y) / p
        turned = self.alternate and k % 2 == 1
        x, y = Pair(x, y).swapped() if turned else Pair(x, y)
        y = (y - b * self._e(x, k)) / a
        x = (x - b * self._e(y, k)) / a
        return Pair(x, y).swapped() if turned else Pair(x, y)

    def run(self, pair: Pair, start: int = 0, stop: int | None = None) -> Pair:
        """Steps ``start`` to ``stop`` (all that are left)."""
        for k in range(start, self.steps if stop is None else stop):
            pair = self.down(pair, k)
        return pair

    def invert(self, pair: Pair, stop: int = 0) -> Pair:
        """From the data back to before step ``stop``."""
        for k in reversed(range(stop, self.steps)):
            pair = self.up(pair, k)
        return pair

    def pull_back(self, end: Pair, pull: Pair) -> tuple[Pair, Pair]:
        """(the starting pair, the gradient there) from the end and the gradient at it, holding one
        step's graph at a time."""
        for k in reversed(range(self.steps)):
            with torch.no_grad():
                start = self.up(end, k)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in start]
                again = self.down(Pair(*inputs), k)
                pull = Pair(*torch.autograd.grad(list(again), inputs, list(pull)))
            end = Pair(*(t.detach() for t in start))
        return end, pull
