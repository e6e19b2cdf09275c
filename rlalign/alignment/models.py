"""A policy that somebody named: a run folder, a pipeline folder, or a plug-in's name."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.core.registry import Recipe, UserError, build, load_class, names
from rlalign.storage import fetch_model, is_url, name_of

if TYPE_CHECKING:
    import torch

    from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Model:
    """A policy that somebody named."""

    title: str
    recipe: Recipe
    run_folder: Path | None = None
    """Where its trained weights and its config.yaml are; None for the weights that the recipe
    loads."""

    def weights(self) -> Mapping[str, torch.Tensor] | None:
        """What a run exports: the average of the newest checkpoint where there is one, else its
        weights."""
        if self.run_folder is None:
            return None
        from rlalign.learning import checkpoint

        return checkpoint.read_weights(self.run_folder, "average", "policy")

    def refuse_spread(self, processes: int) -> None:
        """Raises UserError where its denoiser cannot be spread over so many processes of a rollout
        worker."""
        recipe: Any = self.recipe
        trained = self.run_folder is not None
        recipe.refuse_spread("runtime.rollout.shard", processes, trained=trained)

    def load(self, device: str, **how: Any) -> Policy:
        """The live policy under these weights. ``how`` are keywords of ``PolicyRecipe.load``:
        ``parts``, or a ``reader`` of prompts."""
        policy: Policy = self.recipe.load(device, **how)  # type: ignore[attr-defined]
        weights = self.weights()
        if weights is not None:
            policy.set_weights(weights)
        return policy


OF_A_RUN = (
    "precision",
    "deterministic",
    "gradient_checkpointing",
    "embeddings",
    "decode_rows",
    "vae_tiling",
    "compile",
    "channels_last",
    "vae_tile",
    "decode_frames",
)
"""Settings of a policy that leave a run's weights what they are."""


def find_model(text: str, place: str = "MODEL", **settings: Any) -> Model:
    """The model that a user means: a policy's name, a run folder (also of pretraining), or a
    pipeline folder. ``settings`` are the policy's own; errors name ``place``."""
    from rlalign.networks import lora
    from rlalign.networks.pipelines.checkpoints import settings_folder
    from rlalign.networks.pipelines.loading import find_folder, one_file

    # a name, a run folder, a pipeline folder or one of pretraining; of a URL a copy of it
    folder = fetch_model(text) if is_url(text) else Path(text)
    if (text in names("policies") or ":" in text) and not folder.is_dir():
        return Model(title=text, recipe=build("policies", {**settings, "name": text}, place))
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        from rlalign.config import load_begun

        if other := sorted(settings.keys() - set(OF_A_RUN)):
            raise UserError(
                f"{place}.{other[0]} is the run's own and cannot be changed; of a run folder only"
                f" {', '.join(OF_A_RUN)} can be set"
            )
        recipe = load_begun(folder / "config.yaml").policy
        if settings:
            recipe = build("policies", {**recipe.model_dump(), **settings}, place)
        return Model(title=text, recipe=recipe, run_folder=folder)
    for own in (folder, folder / "policy"):
        if (own / "model_index.json").is_file():
            named = {"name": _family(own), "path": str(own.resolve())}
            return Model(title=text, recipe=build("policies", {**settings, **named}, place))
    if file := one_file(text):
        named = {"name": _family(settings_folder(file)), "path": str(file.resolve())}
        return Model(title=text, recipe=build("policies", {**settings, **named}, place))
    lora.refuse_as_model(text, place)
    if not folder.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        with contextlib.suppress(UserError):
            named = {"name": _family(find_folder(text)), "path": text}
            return Model(title=text, recipe=build("policies", {**settings, **named}, place))
    raise UserError(
        "a model must be a run folder with a checkpoint, a pipeline folder with model_index.json,"
        f" the hub id of one, or one of {', '.join(names('policies'))}; got {text!r}, and looked at"
        f" {name_of(folder.absolute())}"
    )


def _family(folder: Path) -> str:
    """Which policy reads a pipeline folder, by the class that its index names."""
    # every policy says which pipelines it reads
    readers: dict[str, str] = {}
    for name in names("policies"):
        recipe: Any = load_class("policies", name)
        if recipe.by_folder:
            readers |= dict.fromkeys(recipe.family.pipeline_classes, name)

    # the index of the folder names its pipeline
    index = folder / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{index.absolute()} must be JSON with a _class_name, and cannot be read as that"
        ) from error
    if not isinstance(found, str) or found not in readers:
        known = ", ".join(f"{one} ({name})" for one, name in sorted(readers.items()))
        raise UserError(
            f"_class_name in {index.absolute()} must be one that rlalign reads, {known}; got"
            f" {found!r}"
        )
    return readers[found]


def ready_policy(model: Model, device: str, interpolation: float, **how: Any) -> Policy:
    """The policy for sampling: no gradient reaches its weights. ``how`` is as in ``Model.load``."""
    if not math.isclose(interpolation, 1.0) and model.run_folder is None:
        raise UserError(
            "interpolation needs a run folder's policy, which has a base, got policy"
            f" {model.title!r}"
        )
    policy = model.load(device, **how)
    policy.interpolation = interpolation
    return policy
