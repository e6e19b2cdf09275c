"""``rlalign convert``: a published pickle of a reward as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlalign.core.registry import UserError


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .pt or .pth as its authors publish it.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The .safetensors file to write; FILE's name with that ending when left out.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn the published pickle of a reward into safetensors, which rewards read.

    ImageReward, HPS v2 and v2.1, VideoReward, and the head of the aesthetic predictor; says which
    reward reads what it found. Tensors are read and nothing else: a file that asks for code is
    refused.
    """
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.networks import pickles

    # where it goes is looked at before a file of gigabytes is read
    target = out or file.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise UserError(f"OUT must end in .safetensors, got {str(target)!r}")
    if target.exists() and target != file:
        raise UserError(f"{target} is there already; name another file, or remove it")

    # what it is, and the file that the reward reads
    tensors = pickles.read_pickle(file)
    layout = pickles.find_layout(tensors, file)
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        pickles.write_tensors(tensors, target)
    print(f"{file}: {layout.title} ({pickles.summarise(tensors)})")
    print(f"{target}: for a run file, rewards: [{pickles.settings_for(layout, tensors, target)}]")
