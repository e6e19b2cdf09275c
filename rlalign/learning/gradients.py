"""The gradient of an update: those of its shards, summed in the order of the shards.

In one process each parameter's gradient is summed by itself, in the tensors that the backward pass
made. Several processes fill a table with a row for each shard; adding the other processes' zeros
leaves each row as it is, so the sum is the same, bit for bit. Gradients of weights that are spread
over processes are summed by the backward pass, of every process's pass at a time: another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from rlalign.networks.shares import are_shares, gather_numbers, is_share, own_part


class ShardSum:
    """The sum over all shards of all processes; every process adds its own ones, in order."""

    def __init__(self, shards: int, accelerator: Any) -> None:
        """``shards`` are those of all processes; ``accelerator`` is Accelerate's."""
        self._shards = shards
        self._accelerator = accelerator
        self._total: list[torch.Tensor] = []
        self._table: torch.Tensor | None = None
        self._shapes: list[torch.Size] = []
        self._is_in_table: list[bool] = []

    @torch.no_grad()
    def add(self, shard: int, gradients: Sequence[torch.Tensor]) -> None:
        """Takes over the gradients of one shard, a tensor for each parameter: they may be written
        on."""
        # rows of a gradient that is spread are summed over the processes by the backward pass
        apart = self._accelerator.num_processes > 1
        self._is_in_table = [apart and not is_share(one) for one in gradients]
        if any(self._is_in_table):
            self._fill(shard, list(compress(gradients, self._is_in_table)))
        own = [one for one, is_out in zip(gradients, self._is_in_table, strict=True) if not is_out]
        if self._total:
            for mine, other in zip(self._total, own, strict=True):
                own_part(mine).add_(own_part(other))
        else:
            self._total = own

    def _fill(self, shard: int, gradients: Sequence[torch.Tensor]) -> None:
        """Writes one shard's row of the table."""
        if self._table is None:
            count = sum(one.numel() for one in gradients)
            self._table = torch.zeros(self._shards, count, device=gradients[0].device)
            self._shapes = [one.shape for one in gradients]
        offset = 0
        for one in gradients:
            self._table[shard, offset : offset + one.numel()] = one.flatten()
            offset += one.numel()

    @torch.no_grad()
    def result(self) -> list[torch.Tensor]:
        """The sum, a tensor for each parameter."""
        own = iter(self._total)
        others = iter(self._sum_of_table())
        return [next(others if is_out else own) for is_out in self._is_in_table]

    def _sum_of_table(self) -> list[torch.Tensor]:
        if self._table is None:
            return []

        # the rows of all processes, added in order
        table = self._accelerator.reduce(self._table, reduction="sum")
        self._table = None
        flat = table[0]
        for row in table[1:]:
            flat.add_(row)

        # tensors of their own, as one process has them: kernels look at where a tensor begins
        found = []
        offset = 0
        for shape in self._shapes:
            piece = flat[offset : offset + shape.numel()]
            found.append(piece.view(shape).clone())
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
    """Whether every number of these tensors is finite, in all processes that share them; asks a GPU
    once."""
    is_finite = torch.stack([torch.isfinite(own_part(one)).all() for one in gradients]).all()
    if are_shares(gradients):
        is_finite = gather_numbers(is_finite.int()).all()
    return bool(is_finite)


def clip_norm(parameters: Sequence[torch.nn.Parameter], largest: float) -> float:
    """Scales the gradients of parameters down to a norm of ``largest`` over all of them, where
    theirs is above; returns the norm that they had."""
    if not are_shares(parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, largest))

    # the norm of each process's rows, put together in the order of the processes
    own = [own_part(p.grad) for p in parameters if p.grad is not None]
    norm = gather_numbers(torch.nn.utils.get_total_norm(own)).norm()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for one in own:
        one.mul_(factor)
    return float(norm)
