"""A policy without weights: what ``rlalign check`` counts where a checkpoint is not at hand, or
would take long to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlalign.core.registry import UserError

if TYPE_CHECKING:
    from rlalign.policies.base import Policy, PolicyRecipe


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the sizes of a pipeline are taken from, where its weights are not read."""

    sizes: str
    """In words."""
    folder: Path | None = None
    family: str = ""
    """Of ``random_models.FAMILIES``, where there is no folder."""


def find_source(recipe: PolicyRecipe) -> Source | None:
    """Whence the sizes of a policy come whose weights are not here: a folder of configs alone, or
    the published sizes of a hub id that is not in the cache. None for a policy that can be
    loaded."""
    from rlalign.networks.pipelines.loading import INDEX
    from rlalign.networks.random_models import HUB_IDS, find_family

    # a folder without any weights, as rlalign random-model --without-weights writes it
    place = getattr(recipe, "location", "")
    folder = Path(place)
    if (folder / INDEX).is_file():
        if any(folder.glob("*/*.safetensors")):
            return None
        return Source(sizes=f"the configs in {place}, which has no weights", folder=folder)

    # a hub id is downloaded by a run, and by no check
    if folder.exists() or place not in HUB_IDS or _is_cached(place):
        return None
    name = HUB_IDS[place]
    title = find_family(name).title
    return Source(sizes=f"{title} as published: {place} is not in the hub's cache", family=name)


def _is_cached(place: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    from rlalign.networks.pipelines.loading import INDEX

    return isinstance(try_to_load_from_cache(place, INDEX), str)


def folder_source(recipe: PolicyRecipe) -> Source | None:
    """Whence the sizes of a policy come that is read from a folder of diffusers; None for other
    policies."""
    from rlalign.networks.pipelines.loading import INDEX

    folder = Path(getattr(recipe, "location", "") or "/")
    is_folder = (folder / INDEX).is_file()
    return Source(sizes=f"the configs in {folder}", folder=folder) if is_folder else None


def load_empty(recipe: PolicyRecipe, source: Source) -> Policy:
    """The policy of these sizes on torch's meta device, adapters included: shapes and dtypes, no
    numbers. Raises UserError for what the family refuses."""
    from rlalign.networks import random_models
    from rlalign.networks.pipelines.loading import quiet_libraries

    if recipe.adapter:
        raise UserError(
            "policy.adapter must be empty where a checkpoint's weights are not read, got"
            f" {recipe.adapter!r}; say policy.lora_rank in its place"
        )
    maker: Any = recipe
    family_class = maker.family
    with quiet_libraries():
        if source.folder is not None:
            pipeline = random_models.empty_pipeline_of(source.folder)
        else:
            family = random_models.find_family(source.family)
            pipeline = random_models.empty_pipeline(family, "published")
        family_class.check(pipeline, maker.location)
        dtypes: Mapping[str, torch.dtype] = maker.dtypes
        for part, dtype in dtypes.items():
            if (network := getattr(pipeline, part, None)) is not None:
                network.to(dtype)
        whole = family_class(recipe, pipeline, "meta")
        with torch.device("meta"):
            policy = recipe.assemble(whole)
    # autocast knows no such device; who counts says in what is computed
    policy.precision = "float32"
    return policy
