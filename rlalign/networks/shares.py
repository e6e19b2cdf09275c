"""A process's share of a tensor whose rows are spread over processes: a DTensor of torch, cut along
its first dimension as FSDP2 cuts a weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as group


def is_share(tensor: torch.Tensor) -> bool:
    """Whether other processes hold the other rows of a tensor."""
    # a process that spreads nothing does not import what spreads
    return group.is_available() and group.is_initialized() and _is_dtensor(tensor)


def _is_dtensor(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def are_shares(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether any of these tensors is a share."""
    return any(is_share(one) for one in tensors)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its rows of a share, which follow what happens to them,
    or all of it."""
    shared: Any = tensor
    return shared.to_local() if is_share(tensor) else tensor


def range_of_rows(rows: int, count: int, rank: int) -> tuple[int, int]:
    """(first, last + 1) of the rows that process ``rank`` of ``count`` holds: as many as any other,
    but for the last ones, which may have fewer or none."""
    most = -(-rows // count)
    return min(rank * most, rows), min((rank + 1) * most, rows)


def own_rows(share: torch.Tensor) -> tuple[int, int]:
    """(first, last + 1) of the rows of a share that this process holds."""
    mesh = _mesh_of(share)
    return range_of_rows(share.shape[0], mesh.size(), mesh.get_local_rank())


def share_like(share: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor spread as ``share`` is, of which this process holds ``rows``."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        rows,
        _mesh_of(share),
        [Shard(0)],
        run_check=False,
        shape=share.shape,
        stride=share.stride(),
    )


def _mesh_of(share: Any) -> Any:
    return share.device_mesh


@torch.no_grad()
def assign(target: torch.Tensor, value: torch.Tensor) -> None:
    """Writes ``value`` into ``target``; of a whole value a share takes its own rows."""
    if is_share(target) and not is_share(value):
        first, end = own_rows(target)
        own_part(target).copy_(value[first:end])
    else:
        own_part(target).copy_(own_part(value))


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether this process holds the same numbers of both."""
    return torch.equal(own_part(one), own_part(other))


class TensorsByRows(Mapping[str, torch.Tensor]):
    """Tensors by name, each read when it is asked for."""

    @abstractmethod
    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows ``first`` to ``end`` - 1 of a tensor, on the CPU."""


def read_like(tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    """A copy of one of several tensors beside ``like`` and, where that is a share, spread as it is:
    of what is stored its rows alone are read."""
    if not is_share(like):
        return tensors[name].to(like.device, copy=True)
    first, end = own_rows(like)
    if isinstance(tensors, TensorsByRows):
        rows = tensors.rows(name, first, end)
    else:
        whole = tensors[name]
        rows = own_part(whole) if is_share(whole) else whole[first:end]
    return share_like(like, rows.to(like.device, copy=True))


def gather_numbers(own: torch.Tensor) -> torch.Tensor:
    """A number of each process, in their order; every process has to give one."""
    found = [torch.zeros_like(own) for _ in range(group.get_world_size())]
    group.all_gather(found, own)
    return torch.stack(found)


class OrderedSum:
    """How FSDP2 sums gradients here: every process is sent the others' gradients of its own rows,
    and adds them in the order of the processes. A reduction on the way would add in an order that
    depends on how the machines are wired.
    """

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A buffer for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """``input_tensor`` is what each process gets of this one's gradient, one after the other;
        ``output_tensor`` becomes the sum of what all of them have for this one."""
        assert not async_op, "FSDP2 waits for it"
        received = torch.empty_like(input_tensor)
        torch.distributed.all_to_all_single(received, input_tensor, group=group)
        first, *others = received.chunk(group.size())
        output_tensor.copy_(first)
        for other in others:
            output_tensor.add_(other)
