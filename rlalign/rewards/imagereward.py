"""ImageReward: what experts preferred, by a network that reads the caption while it looks at the
picture."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId, TokenizerPathOrHubId
from rlalign.core.registry import UserError, read_reason
from rlalign.networks.towers import CLIP_MEAN, CLIP_STD, Preprocess, hub_file
from rlalign.rewards.aesthetic import affine_head
from rlalign.rewards.base import Reward, Scorer

_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
"""Of the raw score: the published one is whitened with them."""
_HEAD_WIDTH = 64
"""Numbers an attention head, in every BLIP."""
_TOKENS = 35
"""Of a caption; the rest is cut off."""
_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    ("blocks.", "encoder.layers."),
)
"""Parts of names in the checkpoint (timm's) and in transformers."""


class ImageReward(Reward):
    """The published score of ImageReward-v1.0: BLIP's text encoder reads the caption across the
    picture, an affine head follows.

    About -2 to 2; whitened as the published score is. The shorter side is resized to 224 pixels,
    the centre cut out. The published checkpoint is a pickle, which ``rlalign convert`` turns into
    safetensors; all sizes are read from its tensors. Gradients reach the picture, as ReFL needs.

    Weights: ImageReward.pt of hub id THUDM/ImageReward, through rlalign convert; the tokenizer of
    hub id google-bert/bert-base-uncased.

    Source: Xu 2023, arXiv:2304.05977, section 3; the encoder: Li 2022, arXiv:2201.12086 (BLIP).
    """

    differentiable: ClassVar[bool] = True

    weights: LocalPathOrHubId = Field(
        description=(
            "the checkpoint's tensors as a .safetensors file, or a hub id with model.safetensors"
        )
    )
    tokenizer: TokenizerPathOrHubId = Field(
        default="google-bert/bert-base-uncased",
        description="folder of the BERT tokenizer, or hub id",
    )

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing, damaged or foreign file is a UserError."""
        # what is loaded once
        vision, reader, weight_D, bias, words = self._loaded(device)
        side = vision.config.image_size
        reading = threading.Lock()
        preprocess = Preprocess(size=(side, side), mean=CLIP_MEAN, std=CLIP_STD)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            batch, frames = media_BFCHW.shape[:2]
            seen = vision(
                pixel_values=preprocess(media_BFCHW.flatten(0, 1).to(device))
            ).last_hidden_state
            with reading:
                tokens = words(
                    list(prompts),
                    padding="max_length",
                    max_length=_TOKENS,
                    truncation=True,
                    return_tensors="pt",
                ).to(device)
            hidden_NLD = reader(
                input_ids=tokens.input_ids.repeat_interleave(frames, dim=0),
                attention_mask=tokens.attention_mask.repeat_interleave(frames, dim=0),
                encoder_hidden_states=seen,
            ).last_hidden_state
            raw_BF = (hidden_NLD[:, 0] @ weight_D + bias).unflatten(0, (batch, frames))
            return ((raw_BF - _MEAN) / _STD).mean(1)

        return scorer

    def _loaded(self, device: str) -> tuple[Any, Any, torch.Tensor, torch.Tensor, Any]:
        """Both halves of BLIP, the head's weight and bias, and the tokenizer."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers.utils import logging as transformers_logging

        # it would tear the run's own
        transformers_logging.disable_progress_bar()
        place = f"rewards.{self.title}"
        file = hub_file(self.weights, "model.safetensors", f"{place}.weights")
        if file.suffix != ".safetensors" or not file.is_file():
            raise UserError(
                f"{place}.weights must name an existing .safetensors file, got {str(file)!r};"
                " nothing is unpickled (rlalign convert turns ImageReward.pt into one)"
            )
        # both halves of the network and the head, whose sizes the tensors say
        try:
            tensors = load_file(file)
            vision = _vision(tensors)
            reader = _reader(tensors)
            weight_D, bias = affine_head(tensors, "mlp.")
        except KeyError as error:
            raise UserError(
                f"{place}.weights: {file} is of another model: it has no {error}; make it of"
                " ImageReward.pt with rlalign convert"
            ) from error
        except (OSError, RuntimeError, ValueError, IndexError, SafetensorError) as error:
            reason = read_reason(error)
            raise UserError(
                f"{place}.weights: {file} is damaged or of another model ({reason})"
            ) from error
        words = self._words(place, file, reader.config.vocab_size)
        return vision.to(device), reader.to(device), weight_D.to(device), bias.to(device), words

    def _words(self, place: str, file: Path, known: int) -> Any:
        """The tokenizer, which must not have more tokens than the network in ``file`` knows."""
        from transformers import AutoTokenizer

        try:
            words = AutoTokenizer.from_pretrained(
                self.tokenizer, local_files_only=Path(self.tokenizer).is_dir()
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = read_reason(error)
            raise UserError(
                f"{place}.tokenizer: cannot load {self.tokenizer!r}: {reason}"
            ) from error
        if len(words) > known:
            raise UserError(
                f"{place}.tokenizer: {self.tokenizer!r} has {len(words)} tokens, and {file} knows"
                f" {known}; name the tokenizer that it was trained with"
            )
        return words


def _vision(tensors: Mapping[str, torch.Tensor]) -> Any:
    """BLIP's picture encoder, its sizes read from the tensors."""
    from transformers import BlipVisionConfig, BlipVisionModel

    part = _part(tensors, "blip.visual_encoder.")
    width, _, patch, _ = part["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        image_size=round((part["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=len(part["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(part, "blocks."),
        num_attention_heads=width // _HEAD_WIDTH,
        layer_norm_eps=1e-6,
    )
    return _network(
        BlipVisionModel, config, {_renamed(name): tensor for name, tensor in part.items()}
    )


def _renamed(name: str) -> str:
    for theirs, ours in _VISION:
        name = name.replace(theirs, ours)
    return f"post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name


def _reader(tensors: Mapping[str, torch.Tensor]) -> Any:
    """BLIP's text encoder that attends to a picture, its sizes read from the tensors; the names are
    transformers' own."""
    from transformers import BlipTextConfig, BlipTextModel

    part = _part(tensors, "blip.text_encoder.")
    # a count from 0, which older versions saved
    part.pop("embeddings.position_ids", None)
    vocabulary, width = part["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=part["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(part["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(part, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=len(part["embeddings.position_embeddings.weight"]),
        bos_token_id=None,  # for generation, which this is not
        eos_token_id=None,
        sep_token_id=None,
    )
    return _network(BlipTextModel, config, part, add_pooling_layer=False)


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _layers(part: Mapping[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(
        int(name.removeprefix(prefix).split(".")[0]) for name in part if name.startswith(prefix)
    )


def _network(kind: Any, config: Any, tensors: dict[str, torch.Tensor], **more: Any) -> Any:
    """A frozen network in float32 with these weights and no others; KeyError names a missing
    one."""
    model, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        output_loading_info=True,
        **more,
    )
    if found["missing_keys"]:
        raise KeyError(sorted(found["missing_keys"])[0])
    return model.eval().requires_grad_(False)
