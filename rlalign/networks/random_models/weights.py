"""Random weights for a network that has none, a file after the other.

A tensor's numbers depend on the seed, the part and the tensor's name alone. Matrices, kernels and
biases begin as torch's Linear and Conv do (uniform, by the number of inputs), norms as the
identity. A normaliser's running statistics, and those of an autoencoder's latents, are neither 0
nor 1, so that a reader who leaves them out gets another picture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHARD_BYTES = 2_000_000_000
"""A file of weights holds so many bytes at most, or one tensor; memory holds one file."""
MEANS = ("running_mean", "latents_mean")
SPREADS = ("running_var", "latents_std")
"""Buffers that hold statistics."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library -> how it names its files of weights."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A tensor that a file of weights is to hold."""

    name: str
    module: torch.nn.Module
    leaf: str
    """Its name in its module."""
    tensor: torch.Tensor
    """On the meta device, but for real buffers."""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize


def list_slots(network: torch.nn.Module, dtype: torch.dtype) -> list[Slot]:
    """What the network's files hold, in its own order: parameters in ``dtype``, one that stands in
    two places once, and stored buffers as they are."""
    slots = []
    seen: set[int] = set()
    stored = network.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        path, _, leaf = name.rpartition(".")
        is_weight = isinstance(tensor, torch.nn.Parameter)
        slots.append(
            Slot(
                name=name,
                module=network.get_submodule(path),
                leaf=leaf,
                tensor=tensor,
                dtype=dtype if is_weight else tensor.dtype,
            )
        )
    return slots


def write_weights(
    folder: Path,
    slots: Sequence[Slot],
    *,
    stem: str,
    key: tuple[int, str],
    shard_bytes: int = SHARD_BYTES,
    tell: Callable[[int], None] = lambda written: None,
) -> None:
    """Writes a network's tensors as safetensors into a folder: one file, or shards with their
    index.

    ``key`` is the seed and the name of the part; ``tell`` hears of every file's bytes.
    """
    from safetensors.torch import save_file

    shards = list(_split(slots, shard_bytes))
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            tensors = list(threads.map(lambda slot: make_tensor(slot, *key), shard))
        named = {slot.name: tensor for slot, tensor in zip(shard, tensors, strict=True)}
        save_file(named, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(named, name)
        tell(sum(slot.bytes for slot in shard))
        # the next file's tensors come while these would still be held
        del tensors, named
    if len(shards) > 1:
        total = sum(slot.bytes for slot in slots)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _split(slots: Sequence[Slot], limit: int) -> Iterator[list[Slot]]:
    """Runs of tensors of so many bytes at most, one tensor at least."""
    shard: list[Slot] = []
    size = 0
    for slot in slots:
        if shard and size + slot.bytes > limit:
            yield shard
            shard = []
            size = 0
        shard.append(slot)
        size += slot.bytes
    if shard:
        yield shard


def make_tensor(slot: Slot, seed: int, part: str) -> torch.Tensor:
    """A tensor's numbers, on the CPU."""
    is_weight = isinstance(slot.tensor, torch.nn.Parameter)
    if not is_weight and slot.leaf not in MEANS + SPREADS:
        return slot.tensor.detach().clone().contiguous()
    low, high = _bounds(slot)
    found = torch.empty(slot.tensor.shape, dtype=slot.dtype)
    if low == high:
        return found.fill_(low)
    digest = hashlib.blake2b(f"{seed} {part} {slot.name}".encode(), digest_size=8).digest()
    numbers = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return found.uniform_(low, high, generator=numbers)


def _bounds(slot: Slot) -> tuple[float, float]:
    """Between which numbers a tensor's are drawn; the same one twice where they are fixed."""
    if slot.leaf in MEANS:
        return -0.5, 0.5
    if slot.leaf in SPREADS:
        return 0.5, 1.5
    kind = type(slot.module).__name__
    if "norm" in kind.lower():
        # Gemma's norms add the one themselves
        scale = 0.0 if kind.startswith("Gemma") else 1.0
        fixed = 0.0 if slot.leaf == "bias" else scale
        return fixed, fixed
    bound = 1 / math.sqrt(_inputs(slot))
    return -bound, bound


def _inputs(slot: Slot) -> int:
    """How many numbers one output is the sum of: a bias goes with its module's matrix or kernel."""
    shaped: Any = slot.tensor
    weight = getattr(slot.module, "weight", None)
    if slot.leaf == "bias" and isinstance(weight, torch.Tensor) and weight.ndim > 1:
        shaped = weight
    return max(1, shaped.numel() // shaped.shape[0] if shaped.ndim > 1 else shaped.numel())
