"""What is not finite (NaN, infinity) is refused, by the part that gave it: as a picture it would be
black, and have a score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

import torch

from rlalign.core.registry import UserError

DAMAGED = (
    "its weights are damaged, or too large for policy.precision: take another copy of them, or"
    " float32"
)
"""The way out where a part of a model is at fault."""
WEAKER = "where a method of sampler made them, lower its strength or its rate"
"""The way out where latents are not finite and no network is at fault."""

_WATCHED: ContextVar[str] = ContextVar("watched", default="")


class NotFinite(UserError):
    """A part of a model gave values that are not finite."""


class Diverged(NotFinite):
    """The denoiser gave them under trained weights, and did not before it was trained."""


def all_finite(values: Any) -> bool:
    """Whether all tensors in ``values`` are finite: a tensor, tuples of such, or objects with them
    as attributes.

    Arrays of NumPy are let through: scores, of which a missing one is NaN. So are tensors on the
    meta device, which have no numbers. One synchronisation for each tensor on a GPU.
    """
    if isinstance(values, torch.Tensor):
        return (
            values.is_meta
            or not values.is_floating_point()
            or bool(torch.isfinite(values.detach()).all())
        )
    if isinstance(values, tuple | list):
        return all(all_finite(one) for one in values)
    return (
        all(all_finite(one) for one in vars(values).values())
        if hasattr(values, "__dict__")
        else True
    )


def refuse(values: torch.Tensor, part: str, way_out: str = DAMAGED) -> None:
    """Raises NotFinite in the name of ``part`` where some of its values are not finite."""
    if not all_finite(values):
        raise NotFinite(message(part, way_out))


def message(part: str, way_out: str = DAMAGED, where: str = "") -> str:
    """What is said of a part; ``where`` is a place such as "at step 3 of 10"."""
    return (
        f"{part} gives values that are not finite (NaN or infinity){f' {where}' if where else ''};"
        f" {way_out}"
    )


def refuse_pixels(pixels: torch.Tensor, latents: torch.Tensor) -> None:
    """Raises NotFinite for what a decoder made of ``latents``, in its name or theirs."""
    if all_finite(pixels):
        return
    if not all_finite(latents):
        raise NotFinite(f"the latents of the pictures are not finite (NaN or infinity); {WEAKER}")
    raise NotFinite(message("the policy's autoencoder (its decoder)"))


def refuse_weights(parts: Mapping[str, torch.nn.Module]) -> None:
    """Raises NotFinite for the first part with a weight that is not finite: a damaged file."""
    for part, module in parts.items():
        tensors = [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]
        sums = [p.detach().sum(dtype=torch.float32) for _, p in tensors]
        # a sum is not finite where one of its terms is not: one pass over the weights, and one
        # synchronisation
        if not sums or all_finite(torch.stack([s.to(sums[0].device) for s in sums])):
            continue
        for name, tensor in tensors:
            if not all_finite(tensor):
                raise NotFinite(
                    f"policy: the weights of its {part} must be finite, and {name} holds NaN or"
                    " infinity; the file is damaged, take another copy of it"
                )


def refuse_answer(
    policy: Any,
    x: torch.Tensor,
    timestep_B: torch.Tensor,
    words: Any,
) -> None:
    """Raises NotFinite for what a policy's network gave no finite answer to, in the name of the
    part at fault.

    Raises Diverged where the network did answer before it was trained.
    """
    # first what the network was given
    where = watched_place()
    if not all_finite([t for t in words.tensors.values() if t.is_floating_point()]):
        raise NotFinite(message("the policy's text encoder"))
    if not all_finite(x):
        raise NotFinite(
            f"the denoiser is given latents that are not finite (NaN or infinity) {where}; {WEAKER}"
        )
    # then the network itself: it may have been whole before it was trained
    timesteps = ", ".join(f"{t:g}" for t in dict.fromkeys(timestep_B.tolist()))
    where = f"{where}, timestep {timesteps}"
    if policy.reference or any("lora_" in name for name in policy.trainable()):
        with torch.no_grad(), watching(""), policy.as_reference(pretrained=True):
            before = policy.answer(x, timestep_B, words)
        if all_finite(before):
            way_out = (
                "before it was trained they were, so its training has diverged; lower learner.lr,"
                " or look at the rewards"
            )
            raise Diverged(message("the policy's denoiser", way_out, where))
    raise NotFinite(message("the policy's denoiser", where=where))


def watched_place() -> str:
    """Where something was found that is not finite and is looked for; "" where nothing was. Then
    every answer of a policy's network is looked at, to name the part at fault."""
    return _WATCHED.get()


@contextlib.contextmanager
def watching(where: str) -> Iterator[None]:
    """Inside, in this thread, an answer of a policy's network that is not finite is refused, in the
    name of the part at fault."""
    token = _WATCHED.set(where)
    try:
        yield
    finally:
        _WATCHED.reset(token)


def refuse_update(version: int, again: Iterable[Any]) -> NoReturn:
    """Raises for an update whose gradient is not finite; its losses are computed again as ``again``
    is gone through.

    Raises NotFinite for a part of the policy that was at fault before it was trained; else it is
    the training, or a reward.
    """
    with (
        torch.no_grad(),
        watching(f"in update {version + 1}"),
        contextlib.suppress(Diverged),
    ):
        for _ in again:
            pass
    raise UserError(
        f"learner: the gradient is not finite after {version} updates; lower learner.lr, or look at"
        " the rewards"
    )
