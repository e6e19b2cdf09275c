"""A policy that somebody named: a run folder, a pipeline folder, or a plug-in's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.registry import Recipe, UserError, build, names

if TYPE_CHECKING:
    import torch

    from rlalign.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Model:
    """A policy that somebody named."""

    title: str
    recipe: Recipe
    run_folder: Path | None = None
    """Where its trained weights and its config.yaml are; None for the weights that the recipe loads."""

    def weights(self) -> Mapping[str, torch.Tensor] | None:
        """What a run exports: the average of the newest checkpoint where there is one, else its weights."""
        if self.run_folder is None:
            return None
        from rlalign import checkpoint

        tensors = checkpoint.read_tensors(self.run_folder)
        for kind in ("average/", "policy/"):
            found = {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
            if found:
                return found
        raise UserError(f"the newest checkpoint of {self.run_folder} holds no policy; name another folder")

    def load(self, device: str) -> Policy:
        """The live policy under these weights."""
        policy: Policy = self.recipe.load(device)  # type: ignore[attr-defined]
        weights = self.weights()
        if weights is not None:
            policy.set_weights(dict(weights))
        return policy


def find_model(text: str) -> Model:
    """The model that a user means: a policy's name, a run folder (also of pretraining), or a pipeline folder."""
    folder = Path(text)
    if text in names("policies") and not folder.is_dir():
        return Model(title=text, recipe=build("policies", {"name": text}, "MODEL"))
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        from rlalign.config import load_run

        return Model(title=text, recipe=load_run(folder / "config.yaml").policy, run_folder=folder)
    for place in (folder, folder / "policy"):
        if (place / "model_index.json").is_file():
            recipe = build("policies", {"name": _family(place), "path": str(place.resolve())}, "MODEL")
            return Model(title=text, recipe=recipe)
    raise UserError(
        f"a model must be a run folder with a checkpoint, a pipeline folder with model_index.json, or one of "
        f"{', '.join(names('policies'))}; got {text!r}"
    )


def _family(folder: Path) -> str:
    """Which policy reads a pipeline folder, by the class in its index; what is wrong with a damaged one, loading says."""
    index = (folder / "model_index.json").read_text(encoding="utf-8")
    return "sd3" if "StableDiffusion3Pipeline" in index else "stable_diffusion"
