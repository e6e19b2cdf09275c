"""Low-rank adapters (Hu 2021, arXiv:2106.09685) on a denoiser, through peft; saved in diffusers' own format by the policies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ADAPTER = "default"


def attach(network: torch.nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
    """Freezes the network and adds trainable adapters to the layers whose names end in ``targets``.

    The adapters' output starts at zero; their Gaussian initialisation depends on ``seed`` alone. Adapter weights are float32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    scale: Any = alpha or rank  # peft says int, and takes any number
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    network.peft_config = {ADAPTER: config}  # type: ignore[assignment]  # where diffusers' savers look for it


def is_attached(network: torch.nn.Module) -> bool:
    """Whether the network carries adapters."""
    return any("lora_" in name for name, _ in network.named_parameters())


@contextlib.contextmanager
def disabled(network: torch.nn.Module) -> Iterator[None]:
    """Inside, the network computes what it computed before ``attach``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(network: torch.nn.Module) -> None:
    """Adds the adapters into the layers they adapt, for good; the network keeps peft's layer classes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)


def plain_state_dict(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a merged network under the names it had before ``attach``."""
    return {n.replace(".base_layer.", "."): t for n, t in network.state_dict().items() if "lora_" not in n}


def order_header(file: Path) -> None:
    """Rewrites a safetensors file so that its metadata lie in the order of their names: as the library writes them, in the
    order of a hash map, the same adapter would be another file each time."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
