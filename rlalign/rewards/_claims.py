"""What the rewards that check a caption's claims share: how they read it, and what they make of the
claims that hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from rlalign.core.registry import UserError

Scene = TypeVar("Scene")


def read_scene(parse: Callable[[str], Scene], prompt: str, name: str, kind: str) -> Scene:
    """What a prompt claims. Raises UserError, naming the reward and the kind of captions that it
    reads, where the prompt is none."""
    try:
        return parse(prompt)
    except UserError as error:
        raise UserError(
            f"rewards.{name}: prompt {prompt!r} is not a caption of {kind}: {error}"
        ) from error


def share(found: Mapping[str, float]) -> float:
    """The mean of how far each claim holds, 0 to 1."""
    return sum(found.values()) / len(found)
