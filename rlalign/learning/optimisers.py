"""Optimisers: which one a run uses, its learning rate by update, its state as tensors with names,
and the bytes it takes.

AdamW is torch's. Adafactor is transformers', with relative steps and scaling by the weights' size
off, as the published Diffusion-DPO trainer has it: torch's own always scales. AdamW in 8 bits is
bitsandbytes', an extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.core.registry import Before, UserError, read_reason

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_SMALL = 4096
"""Numbers of a tensor below which bitsandbytes keeps its moments in 32 bits."""
_BLOCK = 256
"""Numbers that share a scale in 8 bits, and entries of the map from 8 bits to numbers."""


class OptimiserSettings(BaseModel):
    """The rule that changes weights, and how large its steps are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="learning rate")
    optimizer: Annotated[Literal["adamw", "adafactor", "adamw_8bit"], Before("adamw")] = Field(
        default="adamw",
        description=(
            "adamw; adafactor, whose state is a few rows and columns a matrix; adamw_8bit, whose"
            " moments are bytes (CUDA, the extra 8bit)"
        ),
    )
    warmup: Annotated[int, Before(0)] = Field(
        default=0,
        ge=0,
        description=(
            "updates over which the rate rises in a line from 0; 0 is none (the first of n updates"
            " has rate 0, as in diffusers)"
        ),
    )
    betas: tuple[float, float] = Field(default=_BETAS, description="AdamW's moment decays")
    eps: float = Field(default=_EPS, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")

    @model_validator(mode="after")
    def _are_of_the_optimiser(self) -> OptimiserSettings:
        for name, default in (("betas", _BETAS), ("eps", _EPS)):
            value = getattr(self, name)
            if self.optimizer == "adafactor" and value != default:
                raise ValueError(
                    f"{name} must be left out with optimizer adafactor, which has none, got"
                    f" {value}; or take optimizer adamw"
                )
        return self

    def share_of_rate(self, update: int) -> float:
        """Which share of ``lr`` the update after ``update`` others has: linear warm-up, then
        constant."""
        return min(1.0, update / self.warmup) if self.warmup else 1.0


def refuse_device(settings: OptimiserSettings, device: str) -> None:
    """Raises UserError where the optimiser does not compute on this device."""
    if settings.optimizer == "adamw_8bit" and not device.startswith("cuda"):
        raise UserError(
            f"learner.optimizer adamw_8bit needs a CUDA device, got {device!r}; set runtime.device"
            " to cuda, or take adamw or adafactor"
        )


def refuse_missing(settings: OptimiserSettings) -> None:
    """Raises UserError where the optimiser's package is not installed, or does not load here."""
    if settings.optimizer != "adamw_8bit":
        return
    try:
        import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"learner.optimizer adamw_8bit needs bitsandbytes ({read_reason(error)}); install"
            " rlalign[8bit], or take adamw or adafactor"
        ) from error


def build_optimiser(
    settings: OptimiserSettings, groups: Sequence[Mapping[str, Any]]
) -> torch.optim.Optimizer:
    """The optimiser of groups of parameters; a group may have a learning rate of its own."""
    own = [dict(group) for group in groups]
    how: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}

    # only rows and columns of second moments are kept, and no first ones
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(own, clip_threshold=1.0, scale_parameter=False, relative_step=False, **how)
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        own = [group for group in own if group["params"]]
        return AdamW8bit(own, betas=settings.betas, eps=settings.eps, **how)
    return torch.optim.AdamW(own, betas=settings.betas, eps=settings.eps, **how)


def pack_state(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """``KEY/NAME`` -> what the optimiser keeps of a parameter; whole numbers become int64
    scalars."""
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            found[f"{key}/{name}"] = value if is_tensor else torch.tensor(value)
    return found


def unpack_state(
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """The inverse of ``pack_state``."""
    optimiser.state.clear()
    for packed in sorted(tensors):
        key, _, name = packed.partition("/")
        parameter = parameters[name]
        optimiser.state[parameter][key] = _unpacked(key, tensors[packed], parameter)


def _unpacked(key: str, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> Any:
    # Adafactor and bitsandbytes count in Python
    if tensor.dtype == torch.int64 and not tensor.ndim:
        return int(tensor)
    # AdamW keeps its step count on the CPU, its moments beside the weights
    return tensor.to("cpu" if key == "step" else parameter.device, copy=True)


def bytes_of_state(settings: OptimiserSettings, parameters: Sequence[torch.Tensor]) -> int:
    """Bytes that the optimiser keeps of these parameters after its first update."""
    return sum(_bytes_of(settings.optimizer, parameter) for parameter in parameters)


def _bytes_of(optimizer: str, parameter: torch.Tensor) -> int:
    count = parameter.numel()
    size = parameter.element_size()
    # the mean over the last dimension, and that over the one before it
    if optimizer == "adafactor":
        *outer, rows, columns = (1, 1, *parameter.shape)
        factored = parameter.ndim >= 2
        kept = torch.Size(outer).numel() * (rows + columns) if factored else count
        return size * kept
    # a byte a moment, a scale a block, and the two maps, which all tensors share
    if optimizer == "adamw_8bit" and count >= _SMALL:
        return 2 * (count + 4 * -(-count // _BLOCK))
    return 2 * 4 * count if optimizer == "adamw_8bit" else 2 * size * count
