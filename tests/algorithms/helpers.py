"""What tests of algorithms share: the toy policy on the flow path, scored units of it, numeric
gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from rlalign.core.batches import StepPass
from rlalign.core.records import Plan, Scored
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.policies.base import Policy
from tests.toy import ToyFamily, ToyPolicy, collect, make_units


class FlowToyFamily(ToyFamily):
    """The toy denoiser on the rectified-flow path."""

    prediction = "flow"

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed=seed, dtype=dtype)
        self.path = RectifiedFlow(shift=3.0)


class FlowToy(ToyPolicy):
    """Its policy; with ``dtype`` float64 for exact comparisons."""

    kind = FlowToyFamily


def scored_of(
    policy: ToyPolicy, plan: Plan | None = None, *, count: int = 2, per_unit: int = 8
) -> list[Scored]:
    """Rolled out and scored units; the reward is the first number of the final latent."""
    return collect(
        policy, make_units(count, per_unit=per_unit, plan=plan or Plan(steps=5, eta=1.0))
    )


def in_float64(one: StepPass) -> StepPass:
    """The pass with float64 tensors."""
    return replace(
        one,
        before_BS=one.before_BS.double(),
        after_BS=one.after_BS.double(),
        log_prob_BS=one.log_prob_BS.double(),
        advantage_B=one.advantage_B.double(),
        reward_B=one.reward_B.double(),
    )


def numeric_gradient(
    value: Callable[[], torch.Tensor], policy: Policy, eps: float = 1e-6
) -> torch.Tensor:
    """Central differences of ``value()`` with respect to every trainable weight, flat."""
    found = []
    with torch.no_grad():
        for parameter in policy.trainable().values():
            flat = parameter.data.view(-1)
            for i in range(flat.numel()):
                kept = float(flat[i])
                flat[i] = kept + eps
                up = float(value())
                flat[i] = kept - eps
                down = float(value())
                flat[i] = kept
                found.append((up - down) / (2 * eps))
    return torch.tensor(np.array(found))
