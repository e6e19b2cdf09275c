"""open_clip models as scorers of (picture, caption): built by name or from a JSON file, kept in a
folder, differentiable.

A folder is open_clip's own ("local-dir:"): ``open_clip_config.json``,
``open_clip_model.safetensors`` and, where the model has a tokenizer of its own, the tokenizer's
files; beside them ``reward.json``, which says how the scores are formed.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from rlalign.core.registry import UserError, nearest, read_reason

FORMAT = "rlalign reward 1"
SCORE = "exp(logit_scale) * cos(image, text)"
"""The form of the score: PickScore's (Kirstain 2023, arXiv:2305.01569, section 4)."""

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
REWARD = "reward.json"
TINY = "tiny"
"""The architecture for 32x32 pictures that ships with rlalign."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own normalisation of red, green and blue, which BLIP and PickScore keep."""
_ASSETS = Path(__file__).parents[1] / "assets"
_RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What open_clip does to a picture before its network sees it, in torch, so that gradients
    pass."""

    size: tuple[int, int]
    """(height, width) pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str = "shortest"
    """shortest (then the centre is cut out), longest (then it is padded) or squash."""
    interpolation: str = "bicubic"
    fill_color: int = 0
    antialias: bool = True  # as Pillow does it where a picture becomes smaller

    def __call__(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Pictures in [0, 1] of any size -> the network's input (N, 3, size)."""
        pixels_NCHW = self._resized(pixels_NCHW)
        mean, std = (pixels_NCHW.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels_NCHW - mean) / std

    def _resized(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        height, width = pixels_NCHW.shape[-2:]
        high, wide = self.size
        if (height, width) == (high, wide):
            return pixels_NCHW
        ratios = (high / height, wide / width)
        factor = max(ratios) if self.resize_mode == "shortest" else min(ratios)
        inner = (high, wide)
        if self.resize_mode == "shortest":  # torchvision cuts the longer side's fraction off
            inner = (max(high, int(height * factor)), max(wide, int(width * factor)))
        elif self.resize_mode == "longest":
            inner = (round(height * factor), round(width * factor))
        kind = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        resized = F.interpolate(
            pixels_NCHW, size=inner, mode=kind, antialias=self.antialias, align_corners=False
        )

        # torchvision clips no tensor of floats
        resized = resized.clamp(0.0, 1.0) if self.antialias else resized
        if self.resize_mode == "shortest":
            top = round((inner[0] - high) / 2)
            left = round((inner[1] - wide) / 2)
            return resized[..., top : top + high, left : left + wide]
        left = (wide - inner[1]) // 2
        top = (high - inner[0]) // 2
        rest = (left, wide - inner[1] - left, top, high - inner[0] - top)
        return F.pad(resized, rest, value=self.fill_color / 255.0)


class Towers(torch.nn.Module):
    """An open_clip model with its tokenizer and its preprocessing. ``config`` is open_clip's
    model_cfg."""

    _reading: ClassVar[threading.Lock] = threading.Lock()
    """A tokenizer's padding is a state that each call sets: one thread reads at a time."""

    def __init__(
        self, architecture: str, config: Mapping[str, Any], tokenizer: Any, preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.config = config
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.clip = _network(config)

    def images(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """(B, F, D) unit vectors of frames in [0, 1]."""
        pixels = media_BFCHW.flatten(0, 1).to(self.clip.logit_scale)
        return self.clip.encode_image(self.preprocess(pixels), normalize=True).unflatten(
            0, media_BFCHW.shape[:2]
        )

    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """(B, D) unit vectors; each caption's is computed once."""
        each = list(dict.fromkeys(captions))
        with self._reading:
            tokens = self.tokenizer(each).to(self.clip.logit_scale.device)
        rows = (
            torch.tensor([each.index(c) for c in captions])
            if len(each) < len(captions)
            else slice(None)
        )
        return self.clip.encode_text(tokens, normalize=True)[rows]

    def forward(self, media_BFCHW: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(B,) exp(logit_scale) * cos(image, text), a clip's mean over its frames; media in [0,
        1]."""
        return self.clip.logit_scale.exp() * self.cosine(media_BFCHW, captions)

    def cosine(self, media_BFCHW: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(B,) cos(image, text), a clip's mean over its frames; media in [0, 1]."""
        return (self.images(media_BFCHW) * self.texts(captions)[:, None]).sum(-1).mean(1)


def build_towers(
    architecture: str,
    *,
    tokenizer: str = "",
    pretrained: str = "",
    seed: int = 0,
    place: str = "model",
) -> Towers:
    """Towers with fresh weights keyed by ``seed``, or with those of a safetensors file.

    ``architecture`` is ``tiny``, any name that open_clip knows, or a JSON file with a model_cfg;
    ``tokenizer`` is a folder with a Hugging Face tokenizer, empty for the architecture's own.
    Raises UserError naming settings of ``place``.
    """
    import open_clip

    if tokenizer and not Path(tokenizer).is_dir():
        raise UserError(f"{place}.tokenizer must be a folder with a tokenizer, got {tokenizer!r}")
    file = _ASSETS / "tiny_clip.json" if architecture == TINY else Path(architecture)
    if file.suffix == ".json":
        said = _json(file, f"{place}.architecture {architecture!r}")
        config = said.get("model_cfg", said)
        how = said.get("preprocess_cfg", {})
    else:
        found = open_clip.get_model_config(architecture)
        if found is None:
            raise UserError(
                f"{place}.architecture: no {architecture!r};"
                f" {nearest(architecture, open_clip.list_models())}"
            )
        config = found
        how = {}
    own = config.get("text_cfg", {}).get("hf_tokenizer_name") or ""
    if own == ".":  # beside the file; the tiny architecture shares the tiny model's
        own = str(_ASSETS / "tiny" / "tokenizer" if architecture == TINY else file.parent)
    words = _tokenizer(config, tokenizer or own, f"{place}.tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = _towers(architecture, config, how, words, f"{place}.architecture {architecture!r}")
    if pretrained:
        _read_weights(towers, Path(pretrained), f"{place}.pretrained")
    return towers


def published_towers(
    architecture: str, weights: str, place: str, device: str, **how: Any
) -> Towers:
    """Towers of a published model: an open_clip architecture, and weights from a .safetensors file
    or a hub id.

    A hub id "organisation/name" means its ``open_clip_model.safetensors``; ``how`` is
    ``Preprocess``'s. UserError at ``place``.
    """
    towers = build_towers(architecture, place=place)
    towers.preprocess = replace(towers.preprocess, **how)
    _read_weights(towers, hub_file(weights, WEIGHTS, f"{place}.weights"), f"{place}.weights")
    return towers.to(device).eval().requires_grad_(False)


def hub_file(name: str, file: str, place: str) -> Path:
    """A local path as it is, or ``file`` of the hub repository "organisation/name"; a failing
    download is a UserError."""
    if (
        Path(name).exists()
        or name.endswith(".safetensors")
        or name.count("/") != 1
        or name.startswith((".", "/"))
    ):
        return Path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{place}: cannot get {file} of {name!r} from the hub ({read_reason(error)}); name a"
            " local .safetensors file"
        ) from error


def load_towers(path: str | Path, place: str, device: str = "cpu") -> Towers:
    """Towers from a folder that ``save_towers`` wrote. A missing or damaged one is a UserError at
    ``place``."""
    folder = Path(path)
    missing = next((n for n in (REWARD, CONFIG, WEIGHTS) if not (folder / n).is_file()), None)
    if missing is not None:
        raise UserError(
            f"{place} must be a folder written by rlalign fit-reward, got {str(path)!r} without"
            f" {missing}"
        )
    said = _json(folder / REWARD, place)
    if said.get("format") != FORMAT:
        raise UserError(
            f"{place}: {folder / REWARD} must have the format {FORMAT!r}, got"
            f" {said.get('format')!r}"
        )
    lost = next((n for n in said.get("files", []) if not (folder / n).is_file()), None)
    if lost is not None:
        raise UserError(
            f"{place}: {folder} is incomplete: {lost} is missing; fit the reward again, or copy it"
            " whole"
        )
    clip = _json(folder / CONFIG, place)
    config = clip.get("model_cfg")
    if not isinstance(config, dict):
        raise UserError(f"{place}: {folder / CONFIG} must hold a mapping under model_cfg")
    own = config.get("text_cfg", {}).get("hf_tokenizer_name")
    words = _tokenizer(config, str(folder) if own else "", place)
    towers = _towers(
        str(said.get("architecture", "")), config, clip.get("preprocess_cfg", {}), words, place
    )
    _read_weights(towers, folder / WEIGHTS, place)
    return towers.to(device).eval().requires_grad_(False)


def save_towers(towers: Towers, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the model into an empty folder, with ``facts`` in its ``reward.json``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = copy.deepcopy(dict(towers.config))

    # open_clip's wrapper of a Hugging Face tokenizer
    if hasattr(towers.tokenizer, "save_pretrained"):
        towers.tokenizer.save_pretrained(folder)
        config["text_cfg"]["hf_tokenizer_name"] = "."
    how = {**asdict(towers.preprocess), "size": list(towers.preprocess.size), "mode": "RGB"}
    del how["antialias"]  # open_clip has no such setting
    tensors = {
        n: t.detach().cpu().contiguous().clone() for n, t in towers.clip.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)

    # safetensors writes for the owner alone; a checkout or a package is read by others
    (folder / WEIGHTS).chmod(0o644)
    files = sorted({CONFIG, *(file.name for file in folder.iterdir() if file.is_file())})
    said: dict[str, Any] = {
        "format": FORMAT,
        "architecture": towers.architecture,
        "tokenizer": type(towers.tokenizer).__name__,
    }
    said["files"] = files
    said |= {"score": SCORE, "preprocess": how, **facts}
    for name, value in ((CONFIG, {"model_cfg": config, "preprocess_cfg": how}), (REWARD, said)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _towers(
    architecture: str, config: Mapping[str, Any], how: Mapping[str, Any], words: Any, place: str
) -> Towers:
    try:
        return Towers(architecture, config, words, _preprocess(config, how))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RuntimeError,
        OSError,
    ) as error:
        raise UserError(
            f"{place}: open_clip cannot build this model ({type(error).__name__}:"
            f" {read_reason(error)})"
        ) from error


def _network(config: Mapping[str, Any]) -> Any:
    """open_clip's network of a model_cfg, with fresh weights and no download."""
    import open_clip
    from open_clip.coca_model import CoCa

    own = copy.deepcopy(dict(config))
    custom = own.pop("custom_text", False) or "hf_model_name" in own["text_cfg"]
    if "timm_model_name" in own["vision_cfg"]:
        own["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in own["text_cfg"]:
        own["text_cfg"]["hf_model_pretrained"] = False
    kind = (
        open_clip.CLIP
        if not custom
        else CoCa
        if "multimodal_cfg" in own
        else open_clip.CustomTextCLIP
    )
    return kind(**own)


def _preprocess(config: Mapping[str, Any], how: Mapping[str, Any]) -> Preprocess:
    from open_clip.transform import PreprocessCfg

    said = {**asdict(PreprocessCfg(size=config["vision_cfg"].get("image_size", 224))), **how}
    size = said["size"]
    high, wide = (size, size) if isinstance(size, int) else size
    if said["resize_mode"] not in _RESIZE_MODES:
        raise ValueError(
            f"preprocess_cfg.resize_mode must be one of {_RESIZE_MODES}, got"
            f" {said['resize_mode']!r}"
        )
    return Preprocess(
        size=(int(high), int(wide)),
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
        resize_mode=said["resize_mode"],
        interpolation=said["interpolation"],
        fill_color=int(said["fill_color"]),
    )


def _tokenizer(config: Mapping[str, Any], source: str, place: str) -> Any:
    """open_clip's own tokenizer, or its wrapper of a Hugging Face one from a folder or by name."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config.get("text_cfg", {})
    more = dict(text.get("tokenizer_kwargs", {}))
    length = text.get("context_length", 77)
    if not source:
        return SimpleTokenizer(context_length=length, **more)
    try:
        return HFTokenizer(
            source, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **more
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{place}: cannot load the tokenizer {source!r} ({read_reason(error)})"
        ) from error


def _read_weights(towers: Towers, file: Path, place: str) -> None:
    from open_clip.factory import load_checkpoint
    from safetensors import SafetensorError

    if file.suffix != ".safetensors" or not file.is_file():
        raise UserError(
            f"{place} must name an existing .safetensors file, got {str(file)!r}; nothing is"
            " unpickled (rlalign convert turns the published pickles into safetensors)"
        )
    try:
        load_checkpoint(towers.clip, str(file))
    except (
        SafetensorError,
        RuntimeError,
        KeyError,
        ValueError,
        OSError,
        StopIteration,
        AssertionError,
    ) as error:
        raise UserError(
            f"{place}: {file} is damaged or of another model ({read_reason(error)})"
        ) from error


def _json(file: Path, place: str) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{place}: {file} must be a readable JSON file ({read_reason(error)})"
        ) from error
    if not isinstance(said, dict):
        raise UserError(f"{place}: {file} must hold a mapping, got a {type(said).__name__}")
    return said
