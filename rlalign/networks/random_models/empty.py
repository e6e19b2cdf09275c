"""Networks without memory for their weights: on torch's meta device, where a tensor is its shape
and dtype. FLUX takes a second and no gigabyte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.networks.pipelines.absent import read_empty, takes_config
from rlalign.networks.pipelines.loading import INDEX, LIBRARIES, broken, quiet_libraries
from rlalign.networks.random_models.records import Family, Network, Size
from rlalign.networks.random_models.tokenizers import make_tokenizer


def empty_networks(family: Family, size: Size) -> dict[str, torch.nn.Module]:
    """Part -> its network on the meta device, in float32."""
    with quiet_libraries():
        return {part: build_empty(spec, size) for part, spec in family.networks.items()}


def empty_pipeline(family: Family, size: Size) -> Any:
    """The pipeline of diffusers whose networks are on the meta device; its tokenizers read letter
    by letter."""
    import diffusers

    return getattr(diffusers, family.pipeline)(
        **empty_networks(family, size),
        **{name: make_tokenizer(spec) for name, spec in family.tokenizers.items()},
        **family.facts,
        scheduler=getattr(diffusers, family.scheduler.kind)(**family.scheduler.settings),
    )


def empty_pipeline_of(folder: Path) -> Any:
    """The pipeline of a folder whose networks are on the meta device: its configs, tokenizers and
    scheduler are read, its weights are not and need not be there. Raises UserError for a folder
    without an index, or with a part that cannot be read."""
    import diffusers

    index = _read_index(folder)
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    networks: dict[str, Any] = {}
    try:
        for part, kind in _networks_of(index).items():
            networks[part] = read_empty(kind, folder / part).float()  # as it is loaded
        pipeline = getattr(diffusers, str(index["_class_name"]))
        return pipeline.from_pretrained(
            str(folder), local_files_only=True, **{**absent, **networks}
        )
    except Exception as error:
        raise broken(f"policy.path: cannot read the configs of {str(folder)!r}", error) from error


def build_empty(spec: Network, size: Size, *, buffers: bool = False) -> torch.nn.Module:
    """A network on the meta device; with ``buffers`` its tables (of positions, of rotations) are
    real."""
    from accelerate import init_empty_weights

    kind = _class_of(spec.library, spec.kind)
    settings = spec.settings(size)
    if not buffers:
        with torch.device("meta"):
            return _make(kind, settings)
    with init_empty_weights(include_buffers=False):
        network = _make(kind, settings)
    # weights that are one in memory have become two
    if spec.library == "transformers":
        network.tie_weights()
    return network


def count_family(family: Family, size: Size) -> dict[str, int]:
    """Part -> how many parameters its network has."""
    networks = empty_networks(family, size)
    return {part: count_parameters(network) for part, network in networks.items()}


def count_folder(folder: Path) -> dict[str, int]:
    """Part -> how many parameters its network has, by the configs of a pipeline folder; its weights
    are not read and need not be there.

    Raises UserError for a folder without an index.
    """
    found: dict[str, int] = {}
    with quiet_libraries():
        for part, kind in _networks_of(_read_index(folder)).items():
            found[part] = count_parameters(read_empty(kind, folder / part))
    return found


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} must be a pipeline folder, and has no {INDEX}; name another one")
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


def _networks_of(index: Mapping[str, Any]) -> dict[str, type[torch.nn.Module]]:
    """Part -> the class of its network."""
    found: dict[str, type[torch.nn.Module]] = {}
    for part, kind in index.items():
        if isinstance(kind, list) and kind[0] in LIBRARIES:
            named = _class_of(*kind)
            if isinstance(named, type) and issubclass(named, torch.nn.Module):
                found[part] = named
    return found


def count_parameters(network: torch.nn.Module) -> int:
    """Numbers in a network's parameters; one that stands in two places counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def _class_of(library: str, name: str) -> Any:
    import diffusers
    import transformers

    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)


def _make(kind: Any, settings: Mapping[str, Any]) -> Any:
    """An instance by arguments: transformers takes them in a config."""
    return kind(kind.config_class(**settings)) if takes_config(kind) else kind(**settings)
