"""A denoiser's blocks through torch.compile, and weights of convolutions in channels-last memory.

Compiled code is made for each shape by itself (``dynamic=False``): what a network answers then
depends on the shape of what it is asked, and not on the shapes that were asked before, which differ
between a rollout worker and a learner.

Source: regional compilation, as diffusers' ``compile_repeated_blocks`` does it
(https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.networks.sharding import blocks_of

CONVOLUTIONAL = frozenset({"ResnetBlock2D"})
"""Blocks of a UNet that diffusers does not name among those that repeat."""
SETTINGS: dict[str, Any] = {"dynamic": False}
SHAPES = 512
"""Kinds of call (shape, dtype, with or without gradients) that a block may be compiled for. torch's
own 8 are less than a UNet's widths; what came after them would be computed uncompiled."""


def blocks_to_compile(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that are compiled one by one: of the classes that diffusers says repeat in the
    network, and a UNet's convolutions; where it says none, those of the network's own lists."""
    said = frozenset(getattr(network, "_repeated_blocks", None) or ())
    names = said | CONVOLUTIONAL
    named = [module for module in network.modules() if type(module).__name__ in names]
    return named or blocks_of(network)


def compile_blocks(network: torch.nn.Module) -> None:
    """Has torch compile the blocks of a denoiser, each when it is first asked; names of weights
    stay. Raises UserError for a network in which no block is known."""
    blocks = blocks_to_compile(network)
    if not blocks:
        raise UserError(
            f"policy.compile must be false for {type(network).__name__}, which has no list of"
            " blocks to compile"
        )
    for block in blocks:
        block.compile(**SETTINGS)


def allow_shapes() -> None:
    """Lets this thread compile a block for ``SHAPES`` kinds of call; one more raises, since
    uncompiled code would give other last bits. torch keeps these settings for each thread."""
    import torch._dynamo.config as limits

    if limits.recompile_limit != SHAPES:
        limits.recompile_limit = limits.accumulated_recompile_limit = SHAPES
        limits.fail_on_recompile_limit_hit = True


def is_compiled(network: torch.nn.Module) -> bool:
    """Whether some of a network's blocks are compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


def compile_as(network: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Has a copy's blocks compiled as the network's are, which copying leaves out."""
    for mine, other in zip(network.modules(), twin.modules(), strict=True):
        if mine._compiled_call_impl is not None:
            other.compile(**SETTINGS)


def try_compiler(device: str) -> None:
    """Raises UserError where torch cannot compile for a device: tries it on a small function, with
    all that this takes (a C++ compiler and Python's headers on a CPU, Triton on a GPU)."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + 1.0

    with explained():
        torch.compile(shifted, **SETTINGS)(torch.zeros(8, device=device))


def reason_not_compiled(error: BaseException) -> str:
    """The message with the way out, where an error is the compiler's; "" for others."""
    kinds = [type(one) for one in (error, error.__cause__) if one is not None]
    places = ("torch._dynamo", "torch._inductor")
    if isinstance(error, UserError) or not any(
        kind.__module__.startswith(places) for kind in kinds
    ):
        return ""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
    return (
        f"policy.compile must be false here: torch cannot compile the denoiser ({said[:200]}); or"
        " install what it compiles with, a C++ compiler (g++) and Python's headers on a CPU, Triton"
        " on a GPU"
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Inside, a failure to compile is a UserError with the way out."""
    try:
        yield
    except Exception as error:
        if message := reason_not_compiled(error):
            raise UserError(message) from error
        raise


# --- memory format --------------------------------------------------------------------------------


def use_channels_last(network: torch.nn.Module) -> None:
    """Lays the weights of two-dimensional convolutions out with channels last; what they are asked
    then is laid out so too. Numbers of weights stay."""
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def plain_layout(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, all weights lie as files hold them, row after row."""
    changed = {
        weight: weight.data
        for network in networks
        for weight in network.parameters()
        if not weight.is_contiguous()
    }
    for weight, data in changed.items():
        weight.data = data.contiguous()
    try:
        yield
    finally:
        for weight, data in changed.items():
            weight.data = data
