"""Networks that a process leaves out: there by their config alone, on torch's meta device, where a
weight takes no memory. What is asked of a part's settings is answered as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_empty(kind: Any, folder: Path) -> torch.nn.Module:
    """A network of a class by a folder's config.json, without weights, which need not be there.
    Raises what the library raises for a config that it cannot read."""
    with torch.device("meta"):
        if takes_config(kind):
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))


def takes_config(kind: type) -> bool:
    """Whether an instance is made of a config, as in transformers, and not of arguments."""
    import transformers

    return issubclass(kind, transformers.PreTrainedModel)


def is_absent(network: torch.nn.Module) -> bool:
    """Whether a network has no weights in this process: then none of them is here."""
    first = next(network.parameters(), None)
    return first is not None and first.is_meta
