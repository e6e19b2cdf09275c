"""A denoiser with its adapters merged, written a tensor after the other: memory holds one weight
and what its adapter adds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.networks import lora
from rlalign.networks.compilation import plain_layout
from rlalign.networks.exports import CODES, write_header
from rlalign.networks.pipelines.checkpoints import read_network
from rlalign.networks.pipelines.loading import (
    empty_copy,
    find_folder,
    one_file,
    quiet_libraries,
    weight_files,
)
from rlalign.networks.sharding import is_spread

SHARD_BYTES = 10_000_000_000
"""A file holds so many bytes at most, or one tensor, as diffusers writes them."""
STEM = "diffusion_pytorch_model"

_CODES = {**CODES, torch.int64: "I64", torch.bool: "BOOL"}

Read = Callable[[str], torch.Tensor]
"""Name of a weight before an adapter was attached -> the weight, float32."""


def exact_weights(network: torch.nn.Module, path: str, pipelines: Any, part: str) -> Read:
    """How the plain weights of a network with adapters are read in float32: its own, or where it
    keeps them rounded, or in other processes too, those of its checkpoint, ``part`` of the pipeline
    under ``path``."""
    own = lora.plain_state_dict(network)
    exact = all(p.dtype == torch.float32 for p in network.parameters())
    if exact and not is_spread(network):
        return own.__getitem__

    # the files of a folder are read tensor by tensor, one file of a whole checkpoint as it is
    # converted
    if one_file(path) is None:
        stored = StoredTensors(find_folder(path) / part)
        if own.keys() <= stored.files.keys():
            return stored.read
    return read_network(path, pipelines, part).state_dict().__getitem__


def trained_readers(
    network: torch.nn.Module, parts: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> dict[str, Read]:
    """Part of a pipeline -> how its weights are read where the trained ones, whose names are those
    in ``network``, are kept elsewhere. Each of ``parts`` is a module in it, or all of it."""
    prefixes = {module: f"{name}." if name else "" for name, module in network.named_modules()}

    def reader(part: torch.nn.Module) -> Read:
        own = part.state_dict()
        above = prefixes[part]
        return lambda name: weights[above + name] if above + name in weights else own[name]

    return {name: reader(part) for name, part in parts.items()}


class StoredTensors:
    """The tensors of a network's folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.files: dict[str, Path] = {}
        """Name of a tensor -> the file that holds it."""
        for file in weight_files(folder):
            with safe_open(file, "pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32 where it has floating numbers."""
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as opened:
            tensor = opened.get_tensor(name)
        return tensor.float() if tensor.is_floating_point() else tensor


def save_pipeline(pipeline: Any, folder: Path, reads: Mapping[str, Read]) -> None:
    """Writes a pipeline folder; ``reads`` gives the plain weights of some of its parts."""
    other = copy.copy(pipeline)
    for part, read in reads.items():
        setattr(other, part, _stand_in(getattr(pipeline, part), read))
    networks = [p for p in pipeline.components.values() if isinstance(p, torch.nn.Module)]
    # parts that a pipeline may lack are no news
    with quiet_libraries(), plain_layout(networks):
        other.save_pretrained(folder, safe_serialization=True)


def _stand_in(network: Any, read: Read) -> Any:
    """A network without weights, which diffusers asks to write itself."""
    stand_in = empty_copy(network)

    def save_pretrained(place: str, **_: Any) -> None:
        stand_in.save_config(place)
        write_weights(Path(place), network, read)

    stand_in.save_pretrained = save_pretrained
    return stand_in


def write_weights(
    folder: Path, network: torch.nn.Module, read: Read, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the plain weights of a network with adapters, in float32 and as ``read`` gives them,
    the way diffusers does: one file, or shards with their index."""
    shapes = {name: tensor.shape for name, tensor in lora.plain_state_dict(network).items()}
    kinds = {name: _kind(tensor) for name, tensor in lora.plain_state_dict(network).items()}
    shards = list(_split({n: shapes[n].numel() * kinds[n].itemsize for n in shapes}, shard_bytes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{STEM}.safetensors"
        if len(shards) > 1:
            file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {n: (kinds[n], shapes[n]) for n in names}, read)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(shapes[n].numel() * kinds[n].itemsize for n in shapes)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def _kind(tensor: torch.Tensor) -> torch.dtype:
    """In which a tensor is written."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _split(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Runs of tensors of so many bytes at most, one tensor at least."""
    names: list[str] = []
    size = 0
    for name, count in sizes.items():
        if names and size + count > limit:
            yield names
            names = []
            size = 0
        names.append(name)
        size += count
    if names:
        yield names


def _write_file(
    file: Path, entries: Mapping[str, tuple[torch.dtype, torch.Size]], read: Read
) -> None:
    """One safetensors file; wide numbers lie first, so that each lies at a multiple of its
    width."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(entries, key=lambda one: (-entries[one][0].itemsize, one)):
        kind, shape = entries[name]
        end = offset + shape.numel() * kind.itemsize
        code = _CODES[kind]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    with file.open("wb") as target:
        write_header(target, header)
        for name in header:
            if name != "__metadata__":
                tensor = read(name).detach().to("cpu", entries[name][0]).contiguous()
                target.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
