"""VideoReward's network: Qwen2-VL without its language head, and a head that reads three scores off
three tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.core.registry import UserError, read_reason
from rlalign.rewards._qwen2_vl import (
    TokenReader,
    build_body,
    check_tokens,
    foreign,
    read_base,
    read_instruction,
    read_tensors,
)

DIMENSIONS = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment, in the order of the tokens."""
TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
"""The tokens whose last hidden states the head reads."""
LEAST_PIXELS = 128 * 28 * 28
"""Of a frame as the network sees it; a smaller one is enlarged."""
LEAST_FRAMES = 4
"""That are sampled, of a clip that has as many."""
_PAIR = 2
"""Frames of a patch."""
_NAMES = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)
"""What the authors' file calls the instruction."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What model_config.json says beside the weights."""

    sampled_rate: float
    """Frames a second that are looked at."""
    most_pixels: int
    """Of a frame."""
    lora_scale: float
    """Factor of the product of a LoRA's two matrices."""
    mean_3: torch.Tensor | None
    std_3: torch.Tensor | None
    """Of each score, over the authors' clips; None where the file has none."""


class Network(torch.nn.Module):
    """Clips and captions -> the three scores as the head gives them."""

    def __init__(self, reader: TokenReader, weight_KD: torch.Tensor, most_pixels: int) -> None:
        super().__init__()
        self.reader = reader
        self.register_buffer("weight_KD", weight_KD)
        self.most_pixels = most_pixels

    def forward(self, clips_NFCHW: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(N, 3) float32 of clips in [0, 1] of an even number of frames."""
        pixels = (LEAST_PIXELS, self.most_pixels)
        read_N3D = self.reader(clips_NFCHW, captions, pixels)
        scores_N3K = read_N3D @ self.weight_KD.T
        # a head of three numbers has one for each token
        if scores_N3K.shape[-1] == len(DIMENSIONS):
            return scores_N3K.diagonal(dim1=1, dim2=2)
        return scores_N3K[..., 0]


def sample_frames(frames: int, rate: float, sampled_rate: float) -> list[int]:
    """Which frames of a clip are looked at: an even number, evenly spread from the first to the
    last, ``sampled_rate`` a second and at least ``LEAST_FRAMES`` where there are as many."""
    most = frames // _PAIR * _PAIR
    wanted = min(max(frames / rate * sampled_rate, LEAST_FRAMES), most)
    count = round(wanted / _PAIR) * _PAIR
    return torch.linspace(0, frames - 1, count).round().long().tolist()


# --- loading -------------------------------------------------------------------------------------


def read_published(file: Path, place: str) -> Published:
    """The facts of a model_config.json. Raises UserError."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        data, lora = said["data_config"], said["peft_lora_config"]
        rank = int(lora["lora_r"])
        divisor = math.sqrt(rank) if lora.get("use_rslora") else rank
        norm = said.get("inference_config")
        mean_3, std_3 = (
            torch.tensor([float(norm[f"{name}_{what}"]) for name in DIMENSIONS]) if norm else None
            for what in ("mean", "std")
        )
        return Published(
            sampled_rate=float(data["fps"]),
            most_pixels=int(data["max_frame_pixels"]),
            lora_scale=float(lora["lora_alpha"]) / divisor,
            mean_3=mean_3,
            std_3=std_3,
        )
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{place}: cannot read {file} ({read_reason(error)})") from error
    except KeyError as error:
        raise UserError(
            f"{place}: {file} must be a model_config.json as VideoReward's, got one without {error}"
        ) from error


def read_network(
    base: str, weights: Path, instruction: str, said: Published, dtype: Any, place: str
) -> Network:
    """The network, frozen, on the CPU. Raises UserError at a setting of ``place``."""
    processor, config = read_base(base, TOKENS, f"{place}.base")
    told = "VideoAlign's prompt_template.py"
    asked = read_instruction(Path(instruction), _NAMES, TOKENS, told, f"{place}.instruction")
    tensors = merge_lora(read_tensors(weights, f"{place}.weights"), said.lora_scale)
    head = tensors.get("rm_head.weight")
    if head is None:
        raise foreign(weights, "'rm_head.weight'", f"{place}.weights")
    if head.shape[0] not in (1, len(DIMENSIONS)):
        raise UserError(
            f"{place}.weights: {weights} is of another model: its rm_head gives {head.shape[0]}"
            f" numbers a token, and must give 1 or {len(DIMENSIONS)}"
        )
    body = build_body(tensors, config, dtype, weights, f"{place}.weights")
    check_tokens(processor, TOKENS, body, base, weights, f"{place}.base")
    reader = TokenReader(body, processor, asked, TOKENS, "video")
    return Network(reader, head.float(), said.most_pixels).eval().requires_grad_(False)


def merge_lora(tensors: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Tensors of which those of a LoRA beside its layer (names of peft) are added to the layer's;
    others are as they were."""
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer, mark, kind = name.partition(".base_layer.")
        if not mark:
            merged[name] = tensor
            continue
        down = tensors.get(f"{layer}.lora_A.default.weight")
        up = tensors.get(f"{layer}.lora_B.default.weight")
        if kind == "weight" and down is not None and up is not None:
            added = scale * (up.float() @ down.float())
            tensor = (tensor.float() + added).to(tensor.dtype)
        merged[f"{layer}.{kind}"] = tensor
    return merged
