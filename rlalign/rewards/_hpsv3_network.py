"""HPSv3's network: Qwen2-VL without its language head, and the head that reads a mean and a spread
off one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlalign.core.registry import UserError
from rlalign.rewards._qwen2_vl import (
    TokenReader,
    build_body,
    check_tokens,
    foreign,
    read_base,
    read_instruction,
    read_tensors,
)

TOKEN = "<|Reward|>"
"""The token whose last hidden state the head reads."""
PIXELS = 256 * 28 * 28
"""Of a picture as the network sees it, about, whatever its size and shape."""
_NAMES = ("INSTRUCTION", "prompt_with_special_token")
"""What the authors' file calls the two parts of the instruction."""


class Network(torch.nn.Module):
    """Pictures and captions -> (mean, log spread)."""

    def __init__(self, reader: TokenReader, head: torch.nn.Module) -> None:
        super().__init__()
        self.reader = reader
        self.head = head

    def forward(self, pictures_NCHW: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(N, 2) float32 of pictures in [0, 1] of one size."""
        read_N1D = self.reader(pictures_NCHW[:, None], captions, (PIXELS, PIXELS))
        return self.head(read_N1D[:, 0])


def read_network(base: str, weights: Path, instruction: str, dtype: Any, place: str) -> Network:
    """The network, frozen, on the CPU. Raises UserError at a setting of ``place``."""
    processor, config = read_base(base, [TOKEN], f"{place}.base")
    told = "HPSv3's data_collator_qwen.py"
    asked = read_instruction(Path(instruction), _NAMES, [TOKEN], told, f"{place}.instruction")
    tensors = read_tensors(weights, f"{place}.weights")
    head = _head(tensors, weights, f"{place}.weights")
    body = build_body(tensors, config, dtype, weights, f"{place}.weights")
    check_tokens(processor, [TOKEN], body, base, weights, f"{place}.base")
    reader = TokenReader(body, processor, asked, [TOKEN], "image")
    return Network(reader, head).eval().requires_grad_(False)


def _head(tensors: Mapping[str, torch.Tensor], file: Path, place: str) -> torch.nn.Sequential:
    """The layers of the head in float32, with ReLU between them; it must end in two numbers."""
    places = sorted({int(n.split(".")[1]) for n in tensors if n.startswith("rm_head.")})
    if not places:
        raise foreign(file, "'rm_head'", place)
    layers = list[torch.nn.Module]()
    for number in places:
        weight, bias = tensors[f"rm_head.{number}.weight"], tensors[f"rm_head.{number}.bias"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers += [layer, torch.nn.ReLU()]
    if len(tensors[f"rm_head.{places[-1]}.bias"]) != 2:
        raise UserError(
            f"{place}: {file} is damaged or of another model (its head does not end in a mean and a"
            " spread)"
        )
    return torch.nn.Sequential(*layers[:-1])
