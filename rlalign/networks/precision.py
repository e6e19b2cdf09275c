"""In which precision a denoiser computes, and how a CUDA device is made to repeat its numbers.

Only the network's forward and backward passes are rounded. Steps, log-probs, trained weights and
the optimiser stay float32: the spacing of bfloat16 around a log-prob (7.8e-3) is a hundred times a
usual clip range.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Literal

import torch

from rlalign.core.heap import keep_freed_memory
from rlalign.core.registry import UserError
from rlalign.networks.compilation import reason_not_compiled

Precision = Literal["float32", "tf32", "bfloat16"]


def autocast(
    device: str, precision: Precision, *, keeps_rounded: bool = True
) -> contextlib.AbstractContextManager[object]:
    """Inside, matrix products and convolutions of float32 tensors are done in ``precision``;
    float64 ones stay as they are. With ``keeps_rounded`` the rounded copy of a trained weight is
    kept until the end, for the next time that it is used."""
    if precision != "bfloat16":
        return contextlib.nullcontext()
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=keeps_rounded)


def keep_frozen(network: torch.nn.Module, precision: Precision) -> None:
    """Keeps the weights that are not trained in the precision that they are used in: half the
    memory in bfloat16. The modules that a network of diffusers keeps in float32 stay so."""
    exact = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    if precision == "bfloat16":
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad and not any(part in name.split(".") for part in exact):
                parameter.data = parameter.data.to(torch.bfloat16)


ROUNDED_MODULES: tuple[type[torch.nn.Module], ...] = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)
"""Whose forward pass is one operation that autocast does in bfloat16, weight and bias rounded
first."""


def rounded_names(network: torch.nn.Module, precision: Precision) -> frozenset[str]:
    """Names of the float32 weights that ``autocast`` rounds to bfloat16 before every use: who
    computes in it gets the same numbers from the rounded ones, bit for bit. Empty in another
    precision."""
    if precision != "bfloat16":
        return frozenset()
    rounded: dict[torch.Tensor, str] = {}
    others: set[torch.Tensor] = set()
    for prefix, module in network.named_modules():
        # not those of a subclass, or of a module that was given another forward pass
        plain = type(module) in ROUNDED_MODULES and "forward" not in vars(module)
        for leaf, weight in module.named_parameters(recurse=False):
            if plain and leaf in ("weight", "bias") and weight.dtype == torch.float32:
                rounded.setdefault(weight, f"{prefix}.{leaf}" if prefix else leaf)
            else:
                others.add(weight)
    return frozenset(name for weight, name in rounded.items() if weight not in others)


def settle(device: str, precision: Precision, *, deterministic: bool) -> None:
    """Sets this process up for ``device``: for a CPU, whose kernels repeat their numbers anyway,
    freed memory is kept for the next pass.

    On CUDA: only kernels that repeat their numbers, where that is asked for (asking torch to warn
    alone would leave attention's backward pass as it is), and float32 that means float32 where
    ``precision`` says so (torch's default has tf32 in convolutions; in bfloat16 what is left in
    float32, the decoder, takes tf32 too).
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if torch.device(device).type != "cuda":
        return

    # read when the first product is done
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # rlalign reads no memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"


def unrepeatable(error: RuntimeError) -> str:
    """The way out, where an error says that an operation has no kernel that repeats its numbers; ""
    for other errors."""
    found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    if found is None:
        return ""
    return (
        f"policy.deterministic must be false here: {found[1]} has no CUDA kernel that repeats its"
        " numbers; without it two runs of one seed differ a little"
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Inside, an operation that cannot repeat its numbers, or that cannot be compiled, is a
    UserError with the way out."""
    try:
        yield
    except RuntimeError as error:
        if message := unrepeatable(error) or reason_not_compiled(error):
            raise UserError(message) from error
        raise


def here(device: str) -> str:
    """``device`` by number: "cuda" is the current one of the thread that asks."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def start_thread(threads: int, device: str) -> None:
    """How a thread that computes begins: its threads inside an operation, and its device, which
    torch keeps per thread."""
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
