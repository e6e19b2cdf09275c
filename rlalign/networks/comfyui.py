"""A LoRA in one file under the keys that ComfyUI reads, and that plain diffusers' own loader reads
too.

kohya's keys are a prefix, the layer's name with its dots as underscores, and ``lora_down.weight``,
``lora_up.weight`` or ``alpha``: after ``lora_unet_`` for the layers of a UNet, and of Qwen-Image,
whose names in ComfyUI are diffusers' own; after ``lora_transformer_`` for those of FLUX's
transformer (OneTrainer's keys; kohya's own would join queries, keys and values in one matrix, of
one published width).

Of the others ComfyUI reads diffusers' dotted names, ``lora_A.weight`` and ``lora_B.weight``, after
``transformer.`` (Stable Diffusion 3, FLUX.2) or ``diffusion_model.`` (LTX-Video; Z-Image: the older
of two), and finds the parts of its joined matrices by itself. Diffusers reads them without an
alpha: the scale is multiplied into the second matrix.

Sana, PixArt, HunyuanVideo and CogVideoX have no keys: ComfyUI has no Sana and no CogVideoX of its
own and joins HunyuanVideo's queries, keys and values, and diffusers has no loader for PixArt.

Sources: ComfyUI's comfy/lora.py, and flux_to_diffusers and z_image_to_diffusers in comfy/utils.py;
diffusers' loaders/lora_pipeline.py and loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from rlalign.core.registry import UserError, read_reason
from rlalign.networks import lora
from rlalign.networks.pipelines.loading import empty_copy, quiet_libraries

Keys = Literal["lora_unet_", "lora_transformer_", "transformer.", "diffusion_model."]
TOLERANCE = 1e-5
"""Of what a layer adds, relative to its largest number: diffusers multiplies a scale into a
matrix, which rounds where it is no power of two."""


def save(pipeline: Any, part: str, file: Path, keys: Keys) -> None:
    """Writes the adapters of a pipeline's ``part``, and reads them back by diffusers' loader.

    Raises UserError where there are none, and where the loader would make another adapter of the
    file.
    """
    from safetensors.torch import save_file

    network = getattr(pipeline, part)
    if not lora.is_attached(network):
        raise UserError(
            "--format comfyui must be left out for a model without a LoRA, whose weights were all"
            " trained; export a pipeline folder"
        )
    mine = lora.layers(network)
    save_file(name_tensors(mine, keys), file, metadata={"format": "pt"})
    _refuse_difference(mine, read_back(pipeline, part, file))


def name_tensors(layers: Mapping[str, lora.Layer], keys: Keys) -> dict[str, torch.Tensor]:
    """The tensors of the file, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if keys.endswith("."):
            found[f"{keys}{name}.lora_A.weight"] = layer.down
            found[f"{keys}{name}.lora_B.weight"] = layer.up * layer.scale
        else:
            place = keys + name.replace(".", "_")
            found[f"{place}.lora_down.weight"] = layer.down
            found[f"{place}.lora_up.weight"] = layer.up
            found[f"{place}.alpha"] = torch.tensor(layer.alpha)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def read_back(pipeline: Any, part: str, file: Path) -> dict[str, lora.Layer]:
    """What plain diffusers' loader makes of a file, on a network of which the adapters alone take
    memory. Raises UserError where it refuses the file."""
    twin = copy.copy(pipeline)
    network = empty_copy(getattr(pipeline, part))
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            stand_in = torch.zeros(()).expand(parameter.shape)
            module._parameters[name] = torch.nn.Parameter(stand_in, requires_grad=False)
    setattr(twin, part, network)
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            twin.load_lora_weights(str(file), adapter_name=lora.ADAPTER)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _differs(read_reason(error)) from error
    return lora.layers(network)


def _refuse_difference(mine: Mapping[str, lora.Layer], theirs: Mapping[str, lora.Layer]) -> None:
    """Raises UserError where two adapters do not add the same to the same layers."""
    if other := sorted(mine.keys() ^ theirs.keys()):
        raise _differs(f"the layer {other[0]}")
    for name, layer in mine.items():
        own = _effect(layer)
        found = _effect(theirs[name])
        bound = TOLERANCE * own.abs().max().item()
        if own.shape != found.shape or not (own - found).abs().max().item() <= bound:
            raise _differs(f"the numbers of {name}")


def _effect(layer: lora.Layer) -> torch.Tensor:
    """What a layer adds for one fixed input, (outputs,) in float64: it tells products of matrices
    apart, and is cheaper than they."""
    down = layer.down.flatten(1).double()
    inputs = torch.cos(torch.arange(down.shape[1], dtype=torch.float64))
    return layer.scale * (layer.up.flatten(1).double() @ (down @ inputs.to(down.device)))


def _differs(what: str) -> UserError:
    return UserError(
        "--format comfyui must be left out for an adapter of these layers, whose keys diffusers"
        f" reads otherwise ({what}); export a folder"
    )
