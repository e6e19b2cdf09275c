"""Parts of the embedded tasks' captions: which of them a caption is in depends on it alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from rlalign.core.registry import UserError, nearest

Name = TypeVar("Name", bound=str)

_HELD_OUT_ONE_IN = 8


def is_held_out(text: str) -> bool:
    """Whether a text's hash is 0 modulo 8."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def known_split(split: str, splits: Sequence[Name]) -> Name:
    """The split of that name. Raises UserError where there is none."""
    for known in splits:
        if split == known:
            return known
    raise UserError(
        f"split must be one of {', '.join(splits)}, got {split!r}; {nearest(split, [*splits])}"
    )
