"""Pipelines of diffusers under the names that the models were published with: one file of weights
for Stable Diffusion 1.x and for 3, with the folder of their settings beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

OF_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
OF_A_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OF_AN_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
OF_AN_ATTENTION |= {"to_out.0": "proj_out"}
OF_A_TRANSFORMER = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}


def save_original(pipeline: Any, folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """Writes ``model.safetensors`` and, in ``model/``, the settings alone of a pipeline of either
    kind; parts ``without`` weights in the file keep theirs in the folder."""
    file = folder / "model.safetensors"
    pipeline.save_pretrained(file.with_suffix(""), safe_serialization=True)
    tensors = {f"first_stage_model.{n}": t for n, t in autoencoder(pipeline.vae).items()}
    if hasattr(pipeline, "unet"):
        tensors |= {f"model.diffusion_model.{n}": t for n, t in unet(pipeline.unet).items()}
        encoders = {"text_encoder": "cond_stage_model.transformer."}
    else:
        found = transformer(pipeline.transformer)
        tensors |= {f"model.diffusion_model.{n}": t for n, t in found.items()}
        encoders = {
            "text_encoder": "text_encoders.clip_l.transformer.",
            "text_encoder_2": "text_encoders.clip_g.transformer.",
        }
    for part, prefix in encoders.items():
        if part not in without:
            tensors |= {f"{prefix}{n}": t for n, t in text_encoder(pipeline, part).items()}
    for weights in file.with_suffix("").glob("*/*.safetensors"):
        if weights.parent.name not in without:
            weights.unlink()
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, file)
    return file


def renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def unet(network: Any) -> Tensors:
    """A UNet under the names of Stable Diffusion 1.x: blocks are counted through all levels."""
    layers = network.config.layers_per_block + 1
    found: Tensors = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        level = int(words[1]) if words[1].isdigit() else 0
        rest = ".".join(words[4:])
        if words[0] == "mid_block":
            place = f"middle_block.{1 if words[1] == 'attentions' else 2 * int(words[2])}"
            rest = ".".join(words[3:])
        elif words[0] == "down_blocks":
            layer = layers - 1 if words[2] == "downsamplers" else int(words[3])
            inner = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[words[2]]
            place = f"input_blocks.{level * layers + layer + 1}.{inner}"
            rest = rest.removeprefix("conv.") if words[2] == "downsamplers" else rest
        elif words[0] == "up_blocks":
            layer = layers - 1 if words[2] == "upsamplers" else int(words[3])
            attends = "CrossAttn" in network.config.up_block_types[level]
            inner = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attends else "1"}
            place = f"output_blocks.{level * layers + layer}.{inner[words[2]]}"
        else:
            found[renamed(name, OF_A_UNET)] = tensor
            continue
        is_resnet = "resnets" in words
        found[f"{place}.{renamed(rest, OF_A_RESNET) if is_resnet else rest}"] = tensor
    return found


def autoencoder(network: Any) -> Tensors:
    """An autoencoder under the names of latent diffusion: the decoder's levels count backwards."""
    last = len(network.config.up_block_types) - 1
    found: Tensors = {}
    for name, tensor in network.state_dict().items():
        words = name.split(".")
        if words[1] == "mid_block":
            number = int(words[3])
            inner = f"block_{number + 1}" if words[2] == "resnets" else "attn_1"
            rest = ".".join(words[4:])
            rest = renamed(rest, OF_AN_ATTENTION) if words[2] == "attentions" else rest
            name = f"{words[0]}.mid.{inner}.{rest}"
        elif words[1] in ("down_blocks", "up_blocks"):
            down = words[1] == "down_blocks"
            level = int(words[2]) if down else last - int(words[2])
            sampler = "downsample" if down else "upsample"
            inner = f"block.{words[4]}" if words[3] == "resnets" else sampler
            name = f"{words[0]}.{'down' if down else 'up'}.{level}.{inner}.{'.'.join(words[5:])}"
        name = renamed(name, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})
        found[name] = tensor
    return found


def transformer(network: Any) -> Tensors:
    """A transformer under the names of Stable Diffusion 3: queries, keys and values in one."""
    state = network.state_dict()
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        for new, old in OF_A_TRANSFORMER.items():
            found[f"{old}.{kind}"] = state[f"{new}.{kind}"]
        found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
    for number in range(network.config.num_layers):
        new, old = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        last = number == network.config.num_layers - 1
        for side, queries, norms in (("x", "to_{}", ""), ("context", "add_{}_proj", "added_")):
            block = f"{old}.{side}_block"
            for letter in "qk":
                norm = state[f"{new}.attn.norm_{norms}{letter}.weight"]
                found[f"{block}.attn.ln_{letter}.weight"] = norm
            for kind in ("weight", "bias"):
                parts = [state[f"{new}.attn.{queries.format(c)}.{kind}"] for c in "qkv"]
                found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
                names = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn.to_out.0"}
                names |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
                if side == "context":
                    names = {"adaLN_modulation.1": "norm1_context.linear"}
                    more = {"attn.proj": "attn.to_add_out", "mlp.fc1": "ff_context.net.0.proj"}
                    names |= {} if last else {**more, "mlp.fc2": "ff_context.net.2"}
                for target, source in names.items():
                    tensor = state[f"{new}.{source}.{kind}"]
                    turned = last and side == "context"
                    found[f"{block}.{target}.{kind}"] = swapped(tensor) if turned else tensor
    return found


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Scale and shift in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def text_encoder(pipeline: Any, part: str) -> Tensors:
    """A CLIP text encoder under the names of its first library."""
    found: Tensors = {}
    for name, tensor in getattr(pipeline, part).state_dict().items():
        whole = name.startswith(("text_model.", "text_projection."))
        found[name if whole else f"text_model.{name}"] = tensor
    return found
