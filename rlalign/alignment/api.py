"""A live policy and a live reward by their names: what a notebook begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlalign.alignment.models import find_model
from rlalign.core.registry import UserError, build
from rlalign.networks.devices import usable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rlalign.policies.base import Policy
    from rlalign.rewards.base import Reward

    Score = Callable[[torch.Tensor | np.ndarray, Sequence[str]], torch.Tensor]


def load_policy(name: str | Path, *, device: str = "cpu", **settings: Any) -> Policy:
    """A live policy on ``device``, in evaluation mode.

    ``name`` is a plug-in's name (its file's, or ``package.module:Class``), a pipeline folder in
    diffusers' format or a hub id, whose family is read from its model_index.json, or a run folder,
    whose newest checkpoint is taken. ``settings`` are those that ``rlalign list policies`` shows,
    such as ``path``, ``lora_rank`` or ``precision``. Raises UserError for what is not there, or not
    readable.
    """
    usable(device, "load_policy.device")
    return find_model(str(name), "load_policy", **settings).load(device)


def load_reward(name: str, *, device: str = "cpu", **settings: Any) -> Score:
    """A live reward as a function: ``(media, prompts) -> scores``, float32 of shape (B,), larger is
    better.

    ``name`` is a plug-in's (its file's, or ``package.module:Class``), ``settings`` are those that
    ``rlalign list rewards`` shows. Media are (B, F, 3, H, W): uint8, as a policy samples them, or
    floating point in [0, 1], through which gradients pass where the reward has them. A reward that
    sees latents takes those in place of media: (B, *latent) in floating point, as
    ``sample(..., output="latents")`` gives them. Scores are raw, without the reward's ``weight``;
    one that fails is treated as its ``on_error`` says. Raises UserError for media and prompts that
    do not belong together.
    """
    import torch

    from rlalign.rewards.base import score

    # the reward is built as a run file builds it
    usable(device, "load_reward.device")
    reward = cast("Reward", build("rewards", {**settings, "name": name}, "load_reward"))
    scorer = reward.load_scorer(device)

    # floats keep their gradient, bytes are scored as a run scores them
    def of_media(media: torch.Tensor | np.ndarray, prompts: Sequence[str]) -> torch.Tensor:
        samples_B = torch.as_tensor(media)
        _check_samples(samples_B, prompts, reward)
        if samples_B.is_floating_point():
            return scorer(samples_B, prompts)
        return torch.from_numpy(score(reward, scorer, samples_B.cpu().numpy(), prompts))

    return of_media


def _check_samples(samples_B: torch.Tensor, prompts: Sequence[str], reward: Reward) -> None:
    shape = tuple(samples_B.shape)
    kind = str(samples_B.dtype).removeprefix("torch.")
    title = reward.title
    if reward.sees == "latent":
        if len(shape) < 2 or not kind.startswith("float"):
            raise UserError(
                f"{title}: latents must be floating point of shape (B, *latent), as sample with"
                f" output='latents' gives them, got {kind} of shape {shape}"
            )
    elif len(shape) != 5 or shape[2] != 3 or not (kind == "uint8" or kind.startswith("float")):
        raise UserError(
            f"{title}: media must be uint8, or floating point in [0, 1], of shape (B, F, 3, H, W),"
            f" got {kind} of shape {shape}"
        )
    if isinstance(prompts, str) or len(prompts) != shape[0]:
        raise UserError(
            f"{title}: prompts must be a list of {shape[0]} texts, one for each of the"
            f" {'media' if reward.sees == 'media' else 'latents'}, got {prompts!r}"
        )
