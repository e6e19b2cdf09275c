"""Qwen2-VL without its language head: what the rewards share that read scores off its tokens."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rlalign.core.registry import UserError, read_reason
from rlalign.networks.towers import CLIP_MEAN, CLIP_STD

CAPTION = "{text_prompt}"
"""Where the caption stands in an instruction."""


class TokenReader(torch.nn.Module):
    """Pictures or clips and captions -> the last hidden states of some tokens of the text."""

    def __init__(
        self, body: Any, processor: Any, instruction: str, tokens: Sequence[str], kind: str
    ) -> None:
        """``kind`` is what the network takes the media for, "image" or "video"; ``tokens`` stand in
        ``instruction`` once each."""
        super().__init__()
        self.body = body
        self.processor = processor
        self.instruction = instruction
        self.tokens = tuple(tokens)
        self.kind = kind

    def forward(
        self, media_NFCHW: torch.Tensor, captions: Sequence[str], pixels: tuple[int, int]
    ) -> torch.Tensor:
        """(N, tokens, D) float32 of media in [0, 1] of one size, whose frames are resized to
        between two numbers of pixels; a picture, or an even number of frames."""
        # media as patches
        config = self.body.config.vision_config
        frames_NFCHW = self._resized(media_NFCHW, pixels)
        patches, grid = patchify(frames_NFCHW, config)
        grid_N3 = torch.tensor([grid] * len(captions), device=frames_NFCHW.device)
        count = grid[0] * grid[1] * grid[2] // config.spatial_merge_size**2

        # words, with a place for each patch that the language model sees
        said = self._tokens(captions, count).to(frames_NFCHW.device)
        words_NLD = self.body.language_model.embed_tokens(said.input_ids)
        seen = torch.cat(list(self.body.get_image_features(patches, grid_N3).pooler_output))
        here_NL1 = (said.input_ids == self._media_id)[..., None]
        words_NLD = words_NLD.masked_scatter(here_NL1, seen.to(words_NLD.dtype))

        # places are counted along the text, also those of the patches: so it was trained
        places = torch.arange(words_NLD.shape[1], device=words_NLD.device)
        hidden_NLD = self.body.language_model(
            inputs_embeds=words_NLD,
            attention_mask=said.attention_mask,
            position_ids=places.expand(3, len(captions), -1),
            use_cache=False,
        ).last_hidden_state
        ids = self.processor.tokenizer.convert_tokens_to_ids(list(self.tokens))
        return torch.stack([hidden_NLD[said.input_ids == one].float() for one in ids], dim=1)

    @property
    def _media_id(self) -> int:
        """Number of the token that stands for a patch."""
        return getattr(self.body.config, f"{self.kind}_token_id")

    def _resized(self, media_NFCHW: torch.Tensor, pixels: tuple[int, int]) -> torch.Tensor:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        config = self.body.config.vision_config
        factor = config.patch_size * config.spatial_merge_size
        batch, _, _, height, width = media_NFCHW.shape
        size = smart_resize(height, width, factor, *pixels)
        frames_NCHW = media_NFCHW.flatten(0, 1)
        if (height, width) != size:
            frames_NCHW = F.interpolate(
                frames_NCHW, size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0.0, 1.0)
        mean, std = (frames_NCHW.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return ((frames_NCHW - mean) / std).unflatten(0, (batch, -1))

    def _tokens(self, captions: Sequence[str], count: int) -> Any:
        """The whole conversation of each caption, padded on the right."""
        texts = list[str]()
        for caption in captions:
            # a caption must not bring tokens of its own
            asked = self.instruction.replace(CAPTION, str(caption).replace("<|", "< |"))
            content = [{"type": self.kind}, {"type": "text", "text": asked}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            token = self.processor.tokenizer.convert_ids_to_tokens(self._media_id)
            texts.append(text.replace(token, token * count))
        return self.processor.tokenizer(
            texts, padding=True, padding_side="right", return_tensors="pt"
        )


def patchify(media_NFCHW: torch.Tensor, config: Any) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(patches of all media one after the other, (times, rows, columns) of each).

    Patches that are merged stand beside one another, and a patch covers two frames; a picture is a
    clip of two equal frames.
    """
    side, merge, deep = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    if media_NFCHW.shape[1] == 1:
        media_NFCHW = media_NFCHW.expand(-1, deep, -1, -1, -1)
    count, frames, channels, height, width = media_NFCHW.shape
    times, rows, columns = frames // deep, height // side, width // side
    split = media_NFCHW.reshape(
        count, times, deep, channels, rows // merge, merge, side, columns // merge, merge, side
    )
    grouped = split.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return grouped.reshape(count * times * rows * columns, -1), (times, rows, columns)


# --- loading -------------------------------------------------------------------------------------


def read_base(base: str, tokens: Sequence[str], place: str) -> tuple[Any, Any]:
    """The processor, which knows the reward's tokens, and the configuration of the model that was
    fine-tuned; its weights are not read. Raises UserError."""
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
    made = [AddedToken(token, special=True, normalized=False) for token in tokens]
    processor.tokenizer.add_tokens(made)
    return processor, config


def read_tensors(weights: Path, place: str) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file under today's names. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if weights.suffix != ".safetensors" or not weights.is_file():
        raise UserError(f"{place} must name an existing .safetensors file, got {str(weights)!r}")
    try:
        return {_renamed(name): tensor for name, tensor in load_file(weights).items()}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _damage(weights, error, place) from error


def build_body(
    tensors: Mapping[str, torch.Tensor], config: Any, dtype: torch.dtype, file: Path, place: str
) -> Any:
    """The network from ``tensors`` of a ``file``, with as many words as these have. Raises
    UserError."""
    from transformers import Qwen2VLModel

    kind: Any = Qwen2VLModel
    try:
        held = {n: t for n, t in tensors.items() if n.startswith(("visual.", "language_model."))}
        config.text_config.vocab_size = len(held["language_model.embed_tokens.weight"])
        body, found = kind.from_pretrained(
            None, config=config, state_dict=held, dtype=dtype, output_loading_info=True
        )
        if found["missing_keys"]:
            raise KeyError(sorted(found["missing_keys"])[0])
    except KeyError as error:
        raise foreign(file, str(error), place) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _damage(file, error, place) from error
    return body


def foreign(file: Path, missing: str, place: str) -> UserError:
    """What is said of weights without something that the network has."""
    return UserError(f"{place}: {file} is of another model: it has no {missing}")


def _damage(file: Path, error: BaseException, place: str) -> UserError:
    return UserError(f"{place}: {file} is damaged or of another model ({read_reason(error)})")


def check_tokens(
    processor: Any, tokens: Sequence[str], body: Any, base: str, file: Path, place: str
) -> None:
    """Raises UserError where the tokenizer gives a token a number that the weights do not have."""
    most = body.config.text_config.vocab_size
    for token in tokens:
        number = processor.tokenizer.convert_tokens_to_ids(token)
        if number >= most:
            raise UserError(
                f"{place}: the tokenizer of {base!r} gives {token} the number {number}, and"
                f" {file} knows {most} tokens; name the model that it was made of"
            )


def _renamed(name: str) -> str:
    """A tensor's name in a checkpoint, which has an older layout, as transformers has it now."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    inside = name.startswith(("visual.", "language_model.", "rm_head.", "lm_head."))
    return name if inside else f"language_model.{name}"


def read_instruction(
    file: Path, names: Sequence[str], tokens: Sequence[str], told: str, place: str
) -> str:
    """What the network is told beside the media: a text file, or the authors' Python file, of which
    the strings ``names`` are read and nothing is run; ``told`` names that file in messages.

    Raises UserError, also where the caption's place or one of ``tokens`` is not there once.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            found = _strings_of(ast.parse(text))
            text = "".join(found[name] for name in names)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{place}: cannot read {file} ({read_reason(error)})") from error
    except KeyError as error:
        strings = f"the strings {' and '.join(names)}" if names[1:] else f"the string {names[0]}"
        raise UserError(
            f"{place}: {file} must hold {strings}, as {told} does; it has no {error}"
        ) from error
    if any(text.count(mark) != 1 for mark in (CAPTION, *tokens)):
        marks = ", ".join([CAPTION, *tokens[:-1]])
        ending = "the score is" if len(tokens) == 1 else "the scores are"
        raise UserError(
            f"{place}: {file} must hold {marks} and {tokens[-1]} once each, where the caption"
            f" stands and where {ending} read"
        )
    return text


def _strings_of(tree: ast.Module) -> dict[str, str]:
    """Name -> value of the strings that a module assigns at its top."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node.value.value, str):
                found |= dict.fromkeys(names, node.value.value)
    return found
