"""Whether this machine has the torch device that a setting names, asked before anything is loaded
onto it."""

from __future__ import annotations

from rlalign.core.registry import UserError


def lacking(device: str, setting: str) -> str:
    """What is wrong with ``device`` on this machine, in one sentence; "" where it is there.
    ``setting`` names it."""
    if device == "cpu":
        return ""
    count = gpus()
    if not count:
        return (
            f"{setting} must be cpu on a machine without CUDA, got {device}; set it to cpu, or go"
            " where a GPU is"
        )
    number = int(device.partition(":")[2] or 0)
    if number >= count:
        return (
            f"{setting} must be at most cuda:{count - 1} on this machine, got {device}; GPUs are"
            " counted from 0"
        )
    return ""


def usable(device: str, setting: str) -> str:
    """``device`` itself. Raises UserError where this machine does not have it."""
    if wrong := lacking(device, setting):
        raise UserError(wrong)
    return device


def gpus() -> int:
    """How many GPUs torch sees here; 0 without CUDA."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory
