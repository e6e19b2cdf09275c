"""A denoiser spread over the processes of a learner with FSDP2 (Zhao 2023, arXiv:2304.11277): each
holds an equal part of every weight, and a block's are gathered while it computes.

Of a frozen one adapters stay whole in every process, and the numbers are those of the whole
network, bit for bit: what is gathered is what was spread. Of one that is trained each process
holds its rows of the gradients too, which are summed in the order of the processes. Every process
must ask a network equally often, forwards and backwards: gathering is a collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as group

from rlalign.core.registry import UserError, read_reason
from rlalign.networks.pipelines.loading import empty_copy
from rlalign.networks.shares import OrderedSum, range_of_rows

Loaded = TypeVar("Loaded")


class NotLoaded(UserError):
    """What processes read together was not read by all of them; raised in each."""


def processes() -> int:
    """How many processes a network is spread over: those of torch's group; 1 without one."""
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def reads() -> bool:
    """Whether this is the process that reads what is spread."""
    return processes() == 1 or group.get_rank() == 0


def load_together(load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` gives in this process. Raises NotLoaded, here and in all others, where it
    raises in one of them: the others would wait for it."""
    found: list[Loaded] = []
    failure: Exception | None = None
    try:
        found.append(load())
    except Exception as error:  # noqa: BLE001 -- raised below, in every process
        failure = error
    said = "" if failure is None else str(failure) or read_reason(failure)
    heard: list[str | None] = [None] * processes()
    group.all_gather_object(heard, said)
    first = next(filter(None, heard), "")
    if first:
        raise NotLoaded(first) from failure
    return found[0]


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception is a collective's own, as every process of a group gets it when another
    one's process ends."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return isinstance(error, RuntimeError) and where.startswith("torch.distributed")


# --- stand-ins ------------------------------------------------------------------------------------


def put_stand_ins(pipeline: Any, parts: Sequence[str], device: str) -> dict[str, Any]:
    """Puts a stand-in on ``device`` in the place of each of these parts of a pipeline; returns
    those that this process has read, by name. Every process has to ask."""
    networks = {part: getattr(pipeline, part) for part in parts}
    dtypes = {
        part: {name: weight.dtype for name, weight in network.named_parameters()}
        for part, network in networks.items()
    }
    told = [dtypes]
    group.broadcast_object_list(told, src=0)
    for part, network in networks.items():
        setattr(pipeline, part, make_stand_in(network, told[0][part], device))
    return networks if reads() else {}


def make_stand_in(network: Any, dtypes: Mapping[str, torch.dtype], device: str) -> Any:
    """A network of diffusers like this one whose weights are frozen zeros that take no memory:
    adapters are added to it as to any other. Its buffers are real."""
    found = empty_copy(network)
    for prefix, module in found.named_modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            blank = torch.zeros((), dtype=dtypes[name], device=device).expand(weight.shape)
            setattr(module, leaf, torch.nn.Parameter(blank, requires_grad=False))
    return found


# --- spreading ------------------------------------------------------------------------------------


def spread(network: torch.nn.Module, whole: torch.nn.Module | None, device: str) -> None:
    """Spreads the weights of ``whole``, which one process has read, over the stand-in ``network``
    in all of them, a block after the other: at any time memory holds one block whole beside what is
    spread. ``whole`` is left without weights. Gradients, where weights have some, are summed over
    the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    source = {} if whole is None else dict(whole.state_dict(keep_vars=True))
    # a block may give parts of one tensor back, on which diffusers computes nothing in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    adapters = {weight for name, weight in network.named_parameters() if _is_adapter(name)}
    stored = network.state_dict(keep_vars=True)
    places = {tensor: name for name, tensor in stored.items() if tensor not in adapters}
    for module in [*blocks_of(network), network]:
        for tensor in [*module.parameters(), *module.buffers()]:
            if name := places.pop(tensor, ""):
                _fill(tensor, source, name.replace(".base_layer.", "."))
        part: Any = fully_shard(
            module, mesh=mesh, ignored_params=adapters, reshard_after_forward=True
        )
        # a sum, as that over the shards of one process; not FSDP2's mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_custom_reduce_scatter(OrderedSum())


def blocks_of(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a network computes one after the other: the modules of its own lists."""
    lists = [child for child in network.children() if isinstance(child, torch.nn.ModuleList)]
    return list(chain.from_iterable(lists))


def is_spread(network: torch.nn.Module) -> bool:
    """Whether other processes hold parts of a network's weights."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in network.parameters())


def asked_anywhere(wanted: Sequence[bool]) -> list[bool]:
    """Which of several networks some process asks now; every process has to say which it does."""
    flags = torch.tensor(wanted, dtype=torch.int32, device=device_of_group())
    group.all_reduce(flags, op=group.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def device_of_group() -> str:
    """Where the group's collectives take tensors."""
    return "cuda" if group.get_backend() == "nccl" else "cpu"


class _Beside(torch.autograd.Function):
    """An answer, with a gradient of zeros to another one."""

    @staticmethod
    def forward(ctx: Any, answer: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.other = {"size": other.shape, "dtype": other.dtype, "device": other.device}
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.zeros(**ctx.other)


def beside(answer: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The same numbers; the backward pass goes through ``other`` too, and leaves zeros there."""
    if not other.requires_grad:
        return answer
    found: Any = _Beside.apply(answer, other)
    return found


def _fill(tensor: torch.Tensor, source: dict[str, torch.Tensor], name: str) -> None:
    """Gives a stand-in the numbers of the process that has read them, which lets them go."""
    with torch.no_grad():
        if source:
            read = source[name]
            numbers = read.detach().to(tensor.device).contiguous()
            read.data = read.new_empty(0)
        else:
            numbers = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        group.broadcast(numbers, src=0)
        tensor.data = numbers


def _is_adapter(name: str) -> bool:
    return "lora_" in name


# --- sizes ----------------------------------------------------------------------------------------


def bytes_of_share(network: torch.nn.Module, count: int) -> tuple[int, int]:
    """(bytes that one of ``count`` processes holds of a network that is spread, bytes that it
    gathers while it computes: what is in no block, and two blocks, one of which is on its way)."""
    blocks = blocks_of(network)
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    kept = sum(b.numel() * b.element_size() for b in network.buffers())
    for name, weight in network.named_parameters():
        share = weight if _is_adapter(name) else share_of(weight, count)
        kept += share.numel() * share.element_size()
    sizes = sorted((_frozen_bytes(block.named_parameters()) for block in blocks), reverse=True)
    others = ((n, w) for n, w in network.named_parameters() if id(w) not in inside)
    return kept, _frozen_bytes(others) + sum(sizes[:2])


def share_of(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The largest share of a weight that one of ``count`` processes holds, without numbers."""
    if not weight.ndim:
        return weight
    rows = range_of_rows(weight.shape[0], count, 0)[1]
    return torch.empty((rows, *weight.shape[1:]), dtype=weight.dtype, device="meta")


def largest_block(network: torch.nn.Module) -> int:
    """Bytes of the largest block of a network, or of what is in no block where that is more."""
    inside = [block.parameters() for block in blocks_of(network)]
    found = [sum(w.numel() * w.element_size() for w in weights) for weights in inside]
    others = sum(w.numel() * w.element_size() for w in network.parameters()) - sum(found)
    return max([others, *found])


def _frozen_bytes(named: Iterator[tuple[str, torch.nn.Parameter]]) -> int:
    return sum(w.numel() * w.element_size() for name, w in named if not _is_adapter(name))
