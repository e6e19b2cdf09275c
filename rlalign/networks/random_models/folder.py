"""A pipeline folder of random weights, as diffusers lays one out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.networks.pipelines.loading import quiet_libraries
from rlalign.networks.random_models import empty, weights
from rlalign.networks.random_models.records import Family, Network, Size

DTYPES = {"tiny": torch.float32, "published": torch.bfloat16}
"""Size -> in which type weights are written."""
OTHER_BYTES = 10_000_000
"""Room for configs and tokenizers."""


def disk_bytes(networks: Mapping[str, torch.nn.Module], size: Size) -> dict[str, int]:
    """Part -> bytes of its weights on disk."""
    dtype = DTYPES[size]
    return {
        part: sum(slot.bytes for slot in weights.list_slots(network, dtype))
        for part, network in networks.items()
    }


def refuse_small_disk(folder: Path, needed: int) -> None:
    """Raises UserError where the disk that ``folder`` is to be on has not so many bytes left."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + OTHER_BYTES:
        raise UserError(
            f"{folder}: the weights take {needed / 1e9:.1f} GB and the disk has"
            f" {free / 1e9:.1f} GB left; name a folder on another disk, or leave the weights out"
            " with --without-weights"
        )


def write_pipeline(
    folder: Path,
    family: Family,
    size: Size = "tiny",
    *,
    seed: int = 0,
    with_weights: bool = True,
    tell: Callable[[str, int], None] = lambda part, written: None,
) -> None:
    """Writes a pipeline folder that plain diffusers opens; the same seed gives the same bytes.

    A part after the other; memory holds one file of weights. ``tell`` hears of every file's part
    and bytes. Without weights the folder has configs and tokenizers alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        _write_index(folder, family, size)
        for part, spec in family.networks.items():
            network: Any = empty.build_empty(spec, size, buffers=with_weights)
            _write_config(folder / part, network, spec, DTYPES[size])
            if with_weights:
                weights.write_weights(
                    folder / part,
                    weights.list_slots(network, DTYPES[size]),
                    stem=weights.STEMS[spec.library],
                    key=(seed, part),
                    tell=lambda written, part=part: tell(part, written),
                )


def _write_index(folder: Path, family: Family, size: Size) -> None:
    """Writes what is no network: the index, the tokenizers and the scheduler."""
    pipeline = empty.empty_pipeline(family, size)
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for name in family.tokenizers:
        getattr(pipeline, name).save_pretrained(folder / name)


def _write_config(folder: Path, network: Any, spec: Network, dtype: torch.dtype) -> None:
    """Writes config.json as the network's library does."""
    folder.mkdir(parents=True, exist_ok=True)
    if spec.library == "diffusers":
        network.save_config(folder)
        return
    network.config.architectures = [spec.kind]
    network.config.dtype = dtype
    network.config.save_pretrained(folder)
