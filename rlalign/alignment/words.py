"""Words of prompts where one process of a run encodes for all others: here the process itself.

``rlalign.runtime`` has an actor for it.
"""

from __future__ import annotations

from typing import Any

import torch

from rlalign.config import RuntimeSettings
from rlalign.networks.devices import usable
from rlalign.networks.embeddings import Reader


def encoding_reader(recipe: Any, runtime: RuntimeSettings) -> Reader | None:
    """A reader of texts with text encoders that several policies may share; None where each has
    its own, or a file. Each text is read once."""
    if not recipe.encodes_in_actor:
        return None
    family = recipe.load_encoder(usable(runtime.encoder_device, "runtime.device"))

    def read(text: str) -> dict[str, torch.Tensor]:
        return dict(family.words([text]).tensors)

    return read
