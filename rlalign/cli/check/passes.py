"""What one pass of a network takes, counted without doing it: the most bytes that are alive beside
the weights, and the arithmetic.

Networks are on torch's meta device, where a tensor is its shape and dtype: FLUX takes seconds and
no gigabyte. Counted as on a GPU: attention keeps its inputs and its output and no table of scores,
and in bfloat16 operations take the dtypes that autocast gives them. What kernels take for
themselves while they work is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlalign.networks.precision import Precision

_aten = torch.ops.aten

_NARROW = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
"""What autocast does in bfloat16."""
_WIDE = {
    F.group_norm,
    F.layer_norm,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    torch.rsqrt,
    torch.pow,
    torch.Tensor.pow,
}
"""What autocast does in float32 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a pass takes."""

    peak: int
    """The most bytes that are alive at once, beside what was there before."""
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention (of attention
    the forward ones alone)."""


def count(
    work: Callable[[], Any],
    precision: Precision = "float32",
    network: torch.nn.Module | None = None,
) -> Taken:
    """What ``work`` takes, which computes on the meta device; with ``network``, which may be one
    that checkpoints gradients."""
    counter = _Counter()
    kernels = _Kernels(counter, precision)
    with counter, kernels, _checkpointing(network, kernels):
        found = work()
        del found
    return Taken(peak=counter.peak, flops=counter.flops)


@contextlib.contextmanager
def _checkpointing(network: torch.nn.Module | None, kernels: _Kernels) -> Iterator[None]:
    """Inside, what a network of diffusers computes again in the backward pass is computed by the
    same kernels: torch's modes do not reach there by themselves."""

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), kernels.again()

    checkpoint = partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, context_fn=contexts
    )
    modules: list[Any] = [] if network is None else list(network.modules())
    kept: dict[Any, Any] = {}
    for module in modules:
        if hasattr(module, "_gradient_checkpointing_func"):
            kept[module] = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        for module, function in kept.items():
            module._gradient_checkpointing_func = function


class _Counter(TorchDispatchMode):
    """Watches which storages are made and given up, and counts the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.flops = 0
        self._alive = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is _aten.detach or packet is _aten.view:
            return result
        before = {_key(a) for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in before:
                self.follow(tensor)
        self.flops += _flops_of(packet, args, result)
        return result

    def follow(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage from now until nothing holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)

        def forget(_: Any) -> None:
            self._seen.pop(key, None)
            self._alive -= size

        self._seen[key] = weakref.ref(storage, forget)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops_of(packet: Any, args: Any, result: Any) -> int:
    """Two for each multiplication of a matrix product or a convolution; 0 for anything else."""
    if packet in (_aten.mm, _aten.bmm):
        return 2 * result.numel() * args[0].shape[-1]
    if packet in (_aten.addmm, _aten.baddbmm):
        return 2 * result.numel() * args[1].shape[-1]
    if packet is _aten.convolution:
        return 2 * result.numel() * args[1][0].numel()
    return 0


class _Kernels(TorchFunctionMode):
    """Stands in for a GPU's kernels: autocast's dtypes, and attention without a table of scores."""

    def __init__(self, counter: _Counter, precision: Precision) -> None:
        super().__init__()
        self._counter = counter
        self._precision: Precision = precision
        self._rounds = precision == "bfloat16"
        self._copies: dict[int, torch.Tensor] = {}

    def again(self) -> _Kernels:
        """The same kernels for another place, with the copies of weights that are there already."""
        other = _Kernels(self._counter, self._precision)
        other._copies = self._copies
        return other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._rounds and func in _NARROW:
            args = tuple(self._cast(a, torch.bfloat16) for a in args)
            kwargs = {n: self._cast(a, torch.bfloat16) for n, a in kwargs.items()}
        elif self._rounds and func in _WIDE:
            args = tuple(self._cast(a, torch.float32) for a in args)
            kwargs = {n: self._cast(a, torch.float32) for n, a in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")[len(args) :]
            query, key, value = [*args, *(kwargs[name] for name in names)][:3]
            self._counter.flops += 4 * query.numel() * key.shape[-2]
            return _Attention.apply(query, key, value)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A floating tensor in the dtype; trained weights once, as autocast keeps them."""
        if not isinstance(value, torch.Tensor) or value.dtype == dtype:
            return value
        if not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


class _Attention(torch.autograd.Function):
    """Attention as fused kernels do it: what is kept for the backward pass are the three inputs and
    the output."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        found = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
