"""Pipelines of random weights, one of each kind of model, and what makes one of them unsound."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.toy import save_flow_pipeline, save_pipeline

LARGE = 3e38
"""A weight that is finite and makes an answer infinite: no look at a file finds it."""


def write_sound(folder: Path) -> dict[str, Path]:
    """Two undamaged pipelines: Stable Diffusion ("sd"), and Stable Diffusion 3 ("sd3")."""
    return {"sd": save_pipeline(folder / "sd"), "sd3": save_flow_pipeline(folder / "sd3")}


def spoil(folder: Path, part: str, name: str, value: float, *, whole: bool = True) -> Path:
    """Overwrites a weight of a pipeline's part, or its first number; returns the folder."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    known = name if name in tensors else name.removeprefix("text_model.")
    if whole:
        tensors[known].fill_(value)
    else:
        tensors[known].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
