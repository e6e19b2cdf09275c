"""Published weights that are pickles: read with torch's reader of tensors alone, recognised by the
names of their tensors, written as safetensors.

``torch.load(weights_only=True)`` builds tensors and plain containers and refuses every other class,
so that a file from a stranger runs no code. Nothing else in rlalign reads a pickle.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.core.files import replacing
from rlalign.core.registry import UserError, read_reason

_CLASS = re.compile(r"\bGLOBAL ([\w.]+)")
"""How torch's reader names a class or a function that it refuses."""
_HPS_PATCHES = (1280, 3, 14, 14)
"""Shape of the first convolution of ViT-H-14, which HPS v2 is."""
_LAID_OUT = (
    "ImageReward.pt (blip.* and mlp.layers.*), HPS_v2_compressed.pt and HPS_v2.1_compressed.pt"
    " (an open_clip model under state_dict), sac+logos+ava1-l14-linearMSE.pth (layers.0 to"
    " layers.7), VideoReward's model.pth (base_model.model.* with rm_head)"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A published file: what it is, and the reward that reads it once it is converted."""

    title: str
    reward: str
    setting: str
    """The reward's setting that names the file."""
    needs: tuple[str, ...]
    """Names of tensors by which it is known."""


LAYOUTS = (
    Layout(
        title="ImageReward: BLIP and a head",
        reward="imagereward",
        setting="weights",
        needs=(
            "blip.visual_encoder.patch_embed.proj.weight",
            "blip.text_encoder.embeddings.word_embeddings.weight",
            "mlp.layers.0.weight",
            "mlp.layers.7.bias",
        ),
    ),
    Layout(
        title="a CLIP model in open_clip's layout, as HPS v2 and v2.1 are",
        reward="hpsv2",
        setting="weights",
        needs=("visual.conv1.weight", "token_embedding.weight", "text_projection", "logit_scale"),
    ),
    Layout(
        title="the head of LAION's aesthetic predictor",
        reward="aesthetic",
        setting="head",
        needs=tuple(f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias")),
    ),
    Layout(
        title="VideoReward: Qwen2-VL with a LoRA and a head",
        reward="videoalign",
        setting="weights",
        needs=(
            "base_model.model.rm_head.weight",
            "base_model.model.model.embed_tokens.weight",
            "base_model.model.visual.patch_embed.proj.weight",
        ),
    ),
)


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch saved, by name; those under ``state_dict`` where it has one.

    Raises UserError where there is no such file, where it holds more than tensors and plain
    containers, where it is damaged, and where it is a file of another kind.
    """
    # what is no pickle at all
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; name a .pt or .pth that was downloaded")
    if file.suffix == ".safetensors":
        raise UserError(f"{file} is a .safetensors file already: name it in the reward's settings")

    # any bytes can make a reader of pickles raise anything
    try:
        with warnings.catch_warnings():
            # of a plain pickle's protocol, which the message below is about
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(_refusal(file, error)) from error
    held = found.get("state_dict", found) if isinstance(found, Mapping) else found

    # a mapping of names to tensors, and nothing else
    if not isinstance(held, Mapping) or not held:
        raise UserError(
            f"{file} must hold named tensors, got a {type(held).__name__} of none; rlalign reads"
            f" {_LAID_OUT}"
        )
    strange = next((n for n, t in held.items() if not _is_named_tensor(n, t)), None)
    if strange is not None:
        raise UserError(
            f"{file} must hold named tensors and nothing else, got a"
            f" {type(held[strange]).__name__} at {strange!r}; rlalign reads {_LAID_OUT}"
        )
    return {name: tensor.detach() for name, tensor in held.items()}


def _is_named_tensor(name: Any, tensor: Any) -> bool:
    is_tensor = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return isinstance(name, str) and is_tensor and tensor.device.type != "meta"


def _refusal(file: Path, error: Exception) -> str:
    """What is said of a file that torch's reader refused."""
    text = str(error)
    named = _CLASS.search(text)
    if named:
        return (
            f"{file} is not read: its pickle asks for {named[1]}, and rlalign reads tensors alone,"
            " so that a file runs no code; get the file from its publisher"
        )
    # the first line of torch's advice is about how to switch the protection off
    reason = "it is no pickle of tensors" if "weights_only" in text else read_reason(error)
    return (
        f"{file} is damaged, or no file of torch's ({reason}); download it again and compare its"
        " size"
    )


def find_layout(tensors: Mapping[str, torch.Tensor], file: Path) -> Layout:
    """Which published file these tensors are of. Raises UserError where it is none that a reward
    reads."""
    for layout in LAYOUTS:
        if all(name in tensors for name in layout.needs):
            return layout
    shown = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{file} is of no reward that rlalign knows: it holds {len(tensors)} tensors ({shown},"
        f" ...), and rlalign reads {_LAID_OUT}"
    )


def settings_for(layout: Layout, tensors: Mapping[str, torch.Tensor], out: Path) -> str:
    """The line of a run file that reads the converted file, with what must be named where its sizes
    are not the published ones."""
    more = ""
    if layout.reward == "hpsv2" and tuple(tensors["visual.conv1.weight"].shape) != _HPS_PATCHES:
        more = ", architecture: NAME"
    if layout.reward == "videoalign":
        more = ", instruction: VideoAlign/prompt_template.py"
    return f"{{name: {layout.reward}, {layout.setting}: {out}{more}}}"


def summarise(tensors: Mapping[str, torch.Tensor]) -> str:
    """How many tensors and numbers there are, and of which types."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    return f"{len(tensors)} tensors, {numbers:,} numbers, {', '.join(sorted(kinds))}"


def write_tensors(tensors: Mapping[str, torch.Tensor], out: Path) -> None:
    """Writes a .safetensors file whole or not at all. Tensors that share memory are written each on
    its own."""
    from safetensors.torch import save_file

    with replacing(out) as scratch:
        save_file({name: t.clone().contiguous() for name, t in tensors.items()}, scratch)
        # safetensors writes for the owner alone
        scratch.chmod(0o644)
