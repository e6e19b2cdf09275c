"""HPSv3's network: Qwen2-VL without its language head, and the head that reads a mean and a spread
off one token."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rlalign.core.registry import UserError, read_reason
from rlalign.networks.towers import CLIP_MEAN, CLIP_STD

TOKEN = "<|Reward|>"
"""The token whose last hidden state the head reads."""
PIXELS = 256 * 28 * 28
"""Of a picture as the network sees it, about, whatever its size and shape."""
_PROMPT = "{text_prompt}"
"""Where the caption stands in the instruction."""
_NAMES = ("INSTRUCTION", "prompt_with_special_token")
"""What the authors' file calls the two parts of the instruction."""


class Network(torch.nn.Module):
    """Pictures and captions -> (mean, log spread)."""

    def __init__(self, body: Any, head: torch.nn.Module, processor: Any, instruction: str) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.processor = processor
        self.instruction = instruction

    def forward(self, pictures_NCHW: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(N, 2) float32 of pictures in [0, 1] of one size."""
        # pictures as patches
        config = self.body.config.vision_config
        pixels_NCHW = self._resized(pictures_NCHW)
        patches, grid = patchify(pixels_NCHW, config)
        grid_N3 = torch.tensor([grid] * len(captions), device=pixels_NCHW.device)
        count = grid[1] * grid[2] // config.spatial_merge_size**2

        # words, with a place for each patch that the language model sees
        tokens = self._tokens(captions, count).to(pixels_NCHW.device)
        words_NLD = self.body.language_model.embed_tokens(tokens.input_ids)
        seen = torch.cat(list(self.body.get_image_features(patches, grid_N3).pooler_output))
        here_NL1 = (tokens.input_ids == self.body.config.image_token_id)[..., None]
        words_NLD = words_NLD.masked_scatter(here_NL1, seen.to(words_NLD.dtype))

        # places are counted along the text, also those of the patches: so it was trained
        places = torch.arange(words_NLD.shape[1], device=words_NLD.device)
        hidden_NLD = self.body.language_model(
            inputs_embeds=words_NLD,
            attention_mask=tokens.attention_mask,
            position_ids=places.expand(3, len(captions), -1),
            use_cache=False,
        ).last_hidden_state
        token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        return self.head(hidden_NLD[tokens.input_ids == token].float())

    def _resized(self, pictures_NCHW: torch.Tensor) -> torch.Tensor:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        config = self.body.config.vision_config
        factor = config.patch_size * config.spatial_merge_size
        height, width = pictures_NCHW.shape[-2:]
        size = smart_resize(height, width, factor, PIXELS, PIXELS)
        if (height, width) != size:
            pictures_NCHW = F.interpolate(
                pictures_NCHW, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0.0, 1.0)
        mean, std = (pictures_NCHW.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return (pictures_NCHW - mean) / std

    def _tokens(self, captions: Sequence[str], count: int) -> Any:
        """The whole conversation of each caption, padded on the right."""
        texts = list[str]()
        for caption in captions:
            # a caption must not bring tokens of its own
            asked = self.instruction.replace(_PROMPT, str(caption).replace("<|", "< |"))
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            token = self.processor.tokenizer.convert_ids_to_tokens(self.body.config.image_token_id)
            texts.append(text.replace(token, token * count))
        return self.processor.tokenizer(
            texts, padding=True, padding_side="right", return_tensors="pt"
        )


def patchify(pixels_NCHW: torch.Tensor, config: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(patches of all pictures one after the other, (1, rows, columns) of a picture).

    Patches that are merged stand beside one another; each is repeated over time, since the network
    reads pictures as clips of two equal frames.
    """
    side, merge = config.patch_size, config.spatial_merge_size
    count, channels, height, width = pixels_NCHW.shape
    rows, columns = height // side, width // side
    split = pixels_NCHW.reshape(
        count, channels, rows // merge, merge, side, columns // merge, merge, side
    )
    grouped = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    repeated = grouped.expand(-1, -1, -1, -1, -1, -1, config.temporal_patch_size, -1, -1)
    return repeated.reshape(count * rows * columns, -1), (1, rows, columns)


# --- loading -------------------------------------------------------------------------------------


def read_network(base: str, weights: Path, instruction: str, dtype: Any, place: str) -> Network:
    """The network, frozen, on the CPU. Raises UserError at a setting of ``place``."""
    processor, config = _base(base, f"{place}.base")
    asked = _instruction(Path(instruction), f"{place}.instruction")
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise UserError(
            f"{place}.weights must name an existing .safetensors file, got {str(weights)!r}"
        )
    body, head = _networks(weights, config, dtype, f"{place}.weights")
    token = processor.tokenizer.convert_tokens_to_ids(TOKEN)
    if token >= body.config.text_config.vocab_size:
        raise UserError(
            f"{place}.base: the tokenizer of {base!r} gives {TOKEN} the number {token}, and"
            f" {weights} knows {body.config.text_config.vocab_size} tokens; name the model that it"
            " was made of"
        )
    return Network(body, head, processor, asked).eval().requires_grad_(False)


def _base(base: str, place: str) -> tuple[Any, Any]:
    """The processor, which knows the reward's token, and the configuration of the model that was
    fine-tuned; its weights are not read."""
    from transformers import AddedToken, AutoConfig, AutoProcessor
    from transformers.utils import logging as transformers_logging

    # it would tear the run's own
    transformers_logging.disable_progress_bar()
    local = Path(base).is_dir()
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=local)
        processor = AutoProcessor.from_pretrained(base, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{place}: cannot load {base!r}: {read_reason(error)}") from error
    if config.model_type != "qwen2_vl":
        raise UserError(f"{place} must be a qwen2_vl model, got a {config.model_type} in {base!r}")
    processor.tokenizer.add_tokens([AddedToken(TOKEN, special=True, normalized=False)])
    return processor, config


def _networks(
    weights: Path, config: Any, dtype: torch.dtype, place: str
) -> tuple[Any, torch.nn.Module]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import Qwen2VLModel

    kind: Any = Qwen2VLModel
    try:
        tensors = {_renamed(name): tensor for name, tensor in load_file(weights).items()}
        head = _head(tensors)
        body_tensors = {
            name: tensor
            for name, tensor in tensors.items()
            if name.startswith(("visual.", "language_model."))
        }
        words = body_tensors["language_model.embed_tokens.weight"]
        config.text_config.vocab_size = len(words)
        body, found = kind.from_pretrained(
            None, config=config, state_dict=body_tensors, dtype=dtype, output_loading_info=True
        )
        if found["missing_keys"]:
            raise KeyError(sorted(found["missing_keys"])[0])
    except KeyError as error:
        raise UserError(f"{place}: {weights} is of another model: it has no {error}") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{place}: {weights} is damaged or of another model ({read_reason(error)})"
        ) from error
    return body, head


def _renamed(name: str) -> str:
    """A tensor's name in the checkpoint, which has an older layout, as transformers has it now."""
    name = name.removeprefix("model.")
    inside = name.startswith(("visual.", "language_model.", "rm_head.", "lm_head."))
    return name if inside else f"language_model.{name}"


def _head(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Sequential:
    """The layers of the head in float32, with ReLU between them; it must end in two numbers."""
    places = sorted({int(n.split(".")[1]) for n in tensors if n.startswith("rm_head.")})
    if not places:
        raise KeyError("rm_head")
    layers = list[torch.nn.Module]()
    for place in places:
        weight, bias = tensors[f"rm_head.{place}.weight"], tensors[f"rm_head.{place}.bias"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        layers += [layer, torch.nn.ReLU()]
    if len(tensors[f"rm_head.{places[-1]}.bias"]) != 2:
        raise ValueError("its head does not end in a mean and a spread")
    return torch.nn.Sequential(*layers[:-1])


def _strings_of(tree: ast.Module) -> dict[str, str]:
    """Name -> value of the strings that a module assigns at its top."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node.value.value, str):
                found |= dict.fromkeys(names, node.value.value)
    return found


def _instruction(file: Path, place: str) -> str:
    """What the network is told beside the picture: a text file, or the authors' Python file, of
    which two strings are read and nothing is run."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            found = _strings_of(ast.parse(text))
            text = "".join(found[name] for name in _NAMES)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{place}: cannot read {file} ({read_reason(error)})") from error
    except KeyError as error:
        raise UserError(
            f"{place}: {file} must hold the strings {' and '.join(_NAMES)}, as HPSv3's"
            f" data_collator_qwen.py does; it has no {error}"
        ) from error
    if text.count(_PROMPT) != 1 or text.count(TOKEN) != 1:
        raise UserError(
            f"{place}: {file} must hold {_PROMPT} and {TOKEN} once each, where the caption stands"
            " and where the score is read"
        )
    return text
