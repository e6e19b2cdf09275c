"""Modules that share their weights and have gradients of their own: one per thread."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch

from rlalign.networks.compilation import compile_as

Module = TypeVar("Module", bound=torch.nn.Module)


def replicate(module: Module) -> Module:
    """A copy on the same weights: an update in place reaches both."""
    twin = copy.deepcopy(module)
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        other.data = mine.data
    compile_as(module, twin)
    return twin
