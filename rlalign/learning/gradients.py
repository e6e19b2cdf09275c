"""The gradient of an update: those of its shards, summed in the order of the shards.

In one process each parameter's gradient is summed by itself, in the tensors that the backward pass
made. Several processes fill a table with a row for each shard; adding the other processes' zeros
leaves each row as it is, so the sum is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class ShardSum:
    """The sum over all shards of all processes; every process adds its own ones, in order."""

    def __init__(self, shards: int, accelerator: Any) -> None:
        """``shards`` are those of all processes; ``accelerator`` is Accelerate's."""
        self._shards = shards
        self._accelerator = accelerator
        self._total: list[torch.Tensor] = []
        self._table: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, shard: int, gradients: Sequence[torch.Tensor]) -> None:
        """Takes over the gradients of one shard, a tensor for each parameter: they may be written
        on."""
        if self._accelerator.num_processes > 1:
            self._fill(shard, gradients)
        elif self._total:
            for mine, other in zip(self._total, gradients, strict=True):
                mine.add_(other)
        else:
            self._total = list(gradients)

    def _fill(self, shard: int, gradients: Sequence[torch.Tensor]) -> None:
        """Writes one shard's row of the table."""
        if self._table is None:
            count = sum(one.numel() for one in gradients)
            self._table = torch.zeros(self._shards, count, device=gradients[0].device)
            self._total = [torch.empty_like(one, device="meta") for one in gradients]
        offset = 0
        for one in gradients:
            self._table[shard, offset : offset + one.numel()] = one.flatten()
            offset += one.numel()

    @torch.no_grad()
    def result(self) -> list[torch.Tensor]:
        """The sum, a tensor for each parameter."""
        if self._table is None:
            return self._total

        # the rows of all processes, added in order
        table = self._accelerator.reduce(self._table, reduction="sum")
        self._table = None
        flat = table[0]
        for row in table[1:]:
            flat.add_(row)

        # tensors of their own, as one process has them: kernels look at where a tensor begins
        found = []
        offset = 0
        for shape in self._total:
            piece = flat[offset : offset + shape.numel()]
            found.append(piece.view(shape.shape).clone())
            offset += shape.numel()
        return found


def take_back(value: torch.Tensor, via: torch.Tensor | None) -> None:
    """Adds the gradient of a scalar to those of the parameters. ``via`` is the one tensor by way of
    which parameters enter it, where it says so: what is behind a gradient of zeros is left out,
    which adds zeros."""
    if via is None:
        value.backward()
        return
    (gradient,) = torch.autograd.grad(value, via)
    # zero times what is not finite is none
    if bool(gradient.any()) or not are_finite([value, via]):
        via.backward(gradient)


def take_gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of parameters, which are without one from then on; zeros where there is
    none."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        found.append(torch.zeros_like(parameter) if gradient is None else gradient)
        parameter.grad = None
    return found


def are_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether every number of these tensors is finite; asks a GPU once."""
    return bool(torch.stack([torch.isfinite(one).all() for one in gradients]).all())
