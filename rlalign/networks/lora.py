"""Low-rank adapters (Hu 2021, arXiv:2106.09685) on a denoiser, through peft; saved in diffusers'
own format by the policies."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.core.registry import UserError, read_reason

ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
"""The name of an adapter's file in a folder: diffusers' own."""
SECOND = "_2"
"""How diffusers ends the name of a pipeline's second denoiser, and rlalign the stem of its
adapter's file. The loader reads it under the names of the first (``load_into_transformer_2``)."""


def name_file(part: str) -> str:
    """The name of the file with the adapter of a part."""
    stem, suffix = FILE.rsplit(".", 1)
    return f"{stem}{SECOND}.{suffix}" if part.endswith(SECOND) else FILE


def attach(
    network: torch.nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0
) -> None:
    """Freezes the network and adds trainable adapters to the layers whose names end in ``targets``.

    The adapters' output starts at zero; their Gaussian initialisation depends on ``seed`` alone.
    Adapter weights are float32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    scale: Any = alpha or rank  # peft says int, and takes any number
    config = LoraConfig(
        r=rank, lora_alpha=scale, target_modules=list(targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]), _in_float32(network):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    # where diffusers' savers look for it
    network.peft_config = {ADAPTER: config}  # type: ignore[assignment]


@contextlib.contextmanager
def _in_float32(network: torch.nn.Module) -> Iterator[None]:
    """Inside, stand-ins for weights of another dtype: peft rounds a new adapter to the dtype of the
    layer that it is added to."""
    kept = {p: p.data for p in network.parameters() if p.dtype != torch.float32}
    for parameter, data in kept.items():
        parameter.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def file_of(name: str, part: str = "") -> Path | None:
    """The file of an adapter that a path names, or that lies in the folder which it names; None
    where there is none. ``part`` is the denoiser that it adapts, where there are two."""
    path = Path(name)
    if path.is_dir():
        file = path / name_file(part)
        return file if file.is_file() else None
    return path if path.suffix == ".safetensors" and path.is_file() else None


def refuse_as_model(name: str, place: str) -> None:
    """Raises UserError where ``place`` names an adapter, which is no model by itself."""
    if file_of(name) is not None and not (Path(name) / "model_index.json").is_file():
        raise UserError(
            f"{place} must name a model, got {name!r}, an adapter; name the model that it was"
            f" trained on, and the adapter as policy.adapter={name}"
        )


def attach_saved(pipeline: Any, part: str, name: str, *, rank: int, alpha: float) -> None:
    """Freezes the ``part`` of a pipeline and adds the trainable adapters of a file, in diffusers'
    format, with its weights.

    Rank and alpha are the file's; 0 for ``rank`` and ``alpha`` is to take them as they are. Adapter
    weights are float32. Raises UserError naming the file where it is damaged, of another model, or
    holds what would be left out.
    """
    file = file_of(name, part)
    if file is None:
        within = "; name its policy/ folder" if file_of(str(Path(name) / "policy"), part) else ""
        raise UserError(
            f"policy.adapter must be a folder with {name_file(part)}, or a .safetensors file, got"
            f" {name!r}{within}"
        )

    # only the adapter is trained
    network = getattr(pipeline, part)
    network.requires_grad_(False)
    with _in_float32(network):
        count = _load_adapter(pipeline, part, file)

    # matrices of another part, or of another model, fit nowhere
    tensors = {n: p for n, p in network.named_parameters() if "lora_" in n}
    if not tensors or len(tensors) != count:
        raise UserError(
            f"policy.adapter: {file} must hold LoRA matrices of the {part} alone, and"
            f" {len(tensors)} of its {count} tensors fit there; is it an adapter of this model, and"
            " of no text encoder?"
        )
    for parameter in tensors.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    # a damaged file can hold numbers that are not finite
    if not all(bool(torch.isfinite(p).all()) for p in tensors.values()):
        raise UserError(
            f"policy.adapter: the weights in {file} must be finite, and some are not; take another"
            " copy of it"
        )
    _refuse_other_settings(network, file, rank=rank, alpha=alpha)


def _load_adapter(pipeline: Any, part: str, file: Path) -> int:
    """Adds the adapters of a file to a network; returns how many tensors the file holds, but for
    scales."""
    from diffusers.utils import logging
    from safetensors import SafetensorError, safe_open

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is counted, and refused in one message
    try:
        with safe_open(file, "pt") as opened, torch.random.fork_rng(devices=[]):
            # what is open is no mapping
            names = [n for n in opened.keys() if not n.endswith(".alpha")]  # noqa: SIM118
            told = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
            state, *alphas, metadata = pipeline.lora_state_dict(
                str(file.parent), **told, return_lora_metadata=True
            )
            getattr(pipeline, part).load_lora_adapter(
                state,
                prefix=part.removesuffix(SECOND),
                network_alphas=next(iter(alphas), None),
                metadata=metadata,
                adapter_name=ADAPTER,
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        IndexError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"policy.adapter: {file} is damaged, or no adapter of this model ({read_reason(error)})"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return len(names)


def _refuse_other_settings(
    network: torch.nn.Module, file: Path, *, rank: int, alpha: float
) -> None:
    """Raises UserError where a rank or an alpha was asked for that is not the file's."""
    adapted = _adapted(network).values()
    for setting, asked, found in (
        ("lora_rank", rank, {m.r[ADAPTER] for m in adapted}),
        ("lora_alpha", alpha, {m.lora_alpha[ADAPTER] for m in adapted}),
    ):
        if asked and found != {asked}:
            said = ", ".join(f"{value:g}" for value in sorted(found))
            raise UserError(
                f"policy.{setting} must be 0 (the adapter's own) or {said}, that of {file}, got"
                f" {asked:g}"
            )


def is_attached(network: torch.nn.Module) -> bool:
    """Whether the network carries adapters."""
    return any("lora_" in name for name, _ in network.named_parameters())


@contextlib.contextmanager
def disabled(network: torch.nn.Module) -> Iterator[None]:
    """Inside, the network computes what it computed before ``attach``."""
    adapted = _adapted(network).values()
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What an adapter adds to the weight of one layer: ``scale`` times the product of two
    matrices."""

    down: torch.Tensor
    """(rank, inputs), or a convolution's (rank, inputs, H, W)."""
    up: torch.Tensor
    """(outputs, rank), or (outputs, rank, 1, 1)."""
    scale: float

    @property
    def alpha(self) -> float:
        """The scale times the rank, as files name it."""
        return self.scale * len(self.down)


def layers(network: torch.nn.Module) -> dict[str, Layer]:
    """Name of an adapted layer -> what is added to its weight. Raises UserError where that is more
    than a product of two matrices (a bias, a magnitude)."""
    found: dict[str, Layer] = {}
    for name, module in _adapted(network).items():
        if ADAPTER in module.lora_variant or module.lora_bias[ADAPTER]:
            raise UserError(
                f"the LoRA of {name} must be two matrices to be exported in this form, and has a"
                " bias or a magnitude (DoRA) too; export it as plain diffusers' file"
            )
        found[name] = Layer(
            down=module.lora_A[ADAPTER].weight.detach(),
            up=module.lora_B[ADAPTER].weight.detach(),
            scale=float(module.scaling[ADAPTER]),
        )
    return found


def _adapted(network: torch.nn.Module) -> dict[str, Any]:
    """Name of an adapted layer -> peft's layer in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)}


def merged_reader(
    network: torch.nn.Module, read: Callable[[str], torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    """Name of a plain weight -> its sum with what the network's adapters add to it, computed when
    it is asked for; ``read`` gives the weight, float32."""
    layers(network)  # refuses what a sum of weights would leave out
    adapted = {f"{name}.weight": layer for name, layer in _adapted(network).items()}

    @torch.no_grad()
    def merged(name: str) -> torch.Tensor:
        weight = read(name)
        layer = adapted.get(name)
        return weight if layer is None else weight + layer.get_delta_weight(ADAPTER).to(weight)

    return merged


def merge(network: torch.nn.Module) -> None:
    """Adds the adapters into the layers they adapt, for good; the network keeps peft's layer
    classes."""
    for layer in _adapted(network).values():
        layer.merge(safe_merge=True)


def plain_state_dict(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a merged network under the names it had before ``attach``."""
    return {
        n.replace(".base_layer.", "."): t
        for n, t in network.state_dict().items()
        if "lora_" not in n
    }


def merged_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights on the CPU, ready for a file, with its adapters merged in a copy where it
    has any; the network stays as it is."""
    if is_attached(network):
        network = copy.deepcopy(network)
        merge(network)
    return {n: t.detach().cpu().contiguous() for n, t in plain_state_dict(network).items()}


def save(pipeline: Any, part: str, folder: Path) -> None:
    """Writes the adapters of a pipeline's ``part`` as the file that its ``load_lora_weights``
    reads, with their settings."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    # of a transformer the loader knows peft's own names only
    network = getattr(pipeline, part)
    tensors = get_peft_model_state_dict(network)
    if part == "unet":
        tensors = convert_state_dict_to_diffusers(tensors)

    # without the adapter's own settings diffusers would take alpha to be the rank
    settings = network.peft_config[ADAPTER].to_dict()

    # the same policy is the same file, whichever process writes it: sets and the header in an order
    # of their own
    settings = {
        name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()
    }
    first = part.removesuffix(SECOND)
    named = {f"{first}_lora_layers": tensors, f"{first}_lora_adapter_metadata": settings}
    if part != first:
        named["weight_name"] = name_file(part)
    pipeline.save_lora_weights(folder, safe_serialization=True, **named)
    order_header(folder / name_file(part))


def order_header(file: Path) -> None:
    """Rewrites a safetensors file so that its metadata lie in the order of their names: as the
    library writes them, in the order of a hash map, the same adapter would be another file each
    time."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
