"""What an optimiser is, and its state as tensors with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from rlalign.core.registry import Recipe
from rlalign.networks.shares import read_like


class Optimizer(Recipe):
    """Base of an optimiser: its settings, and the torch optimiser that they make."""

    shelf: ClassVar[str] = "optimizers"
    can_spread: ClassVar[bool] = False
    """Whether it steps a weight by its rows, so that processes may hold some of them each."""

    def refuse_device(self, device: str) -> None:
        """Raises UserError where it does not compute on this device."""

    def refuse_missing(self) -> None:
        """Raises UserError where a package that it needs is not installed, or does not load."""

    def build(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """The optimiser of groups of parameters, as torch takes them; ``lr`` is the rate of a group
        without one of its own. The second group may have no parameters.

        What it keeps of a parameter must be tensors and whole numbers: that is saved.
        """
        raise NotImplementedError

    def bytes_of_state(self, parameters: Sequence[torch.Tensor]) -> int:
        """Bytes that it keeps of these parameters after its first update, counts aside."""
        raise NotImplementedError

    def bytes_of_step(self, parameters: Sequence[torch.Tensor], device: str) -> int:
        """Bytes that it takes beside its state while it steps: here those of an optimiser that
        steps a parameter at a time, three tensors of the largest one's size."""
        return 3 * max((p.numel() * p.element_size() for p in parameters), default=0)


def pack_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """``KEY/NAME`` -> what the optimiser keeps of a parameter; whole numbers become int64
    scalars."""
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            found[f"{key}/{name}"] = value if is_tensor else torch.tensor(value)
    return found


def unpack_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    prefix: str = "",
) -> None:
    """The inverse of ``pack_state``, of the tensors whose names begin with ``prefix``."""
    optimizer.state.clear()
    for packed in sorted(name for name in tensors if name.startswith(prefix)):
        key, _, name = packed.removeprefix(prefix).partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = _unpacked(key, tensors, packed, parameter)


def _unpacked(
    key: str, tensors: Mapping[str, torch.Tensor], packed: str, parameter: torch.nn.Parameter
) -> Any:
    # AdamW keeps its step count on the CPU, its moments beside the weights and spread as they are
    beside = parameter if key != "step" else torch.empty(0)
    tensor = read_like(tensors, packed, beside)
    # Adafactor and bitsandbytes count in Python
    return int(tensor) if tensor.dtype == torch.int64 and not tensor.ndim else tensor
