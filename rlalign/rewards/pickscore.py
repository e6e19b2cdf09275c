"""PickScore: what people picked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId, TokenizerPathOrHubId
from rlalign.core.registry import UserError, read_reason
from rlalign.networks.towers import CLIP_MEAN, CLIP_STD, Preprocess
from rlalign.rewards.base import Reward, Scorer


class PickScore(Reward):
    """exp(logit_scale) * cos(picture, caption) of a CLIP ViT-H/14 trained on Pick-a-Pic, in
    transformers' format; about 18 to 24.

    The difference of two scores is the log odds that people pick the first. Gradients reach the
    picture.

    Weights: hub id yuvalkirstain/PickScore_v1 (safetensors), the default; the tokenizer of hub id
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    Source: Kirstain 2023, arXiv:2305.01569.
    """

    differentiable: ClassVar[bool] = True

    path: LocalPathOrHubId = Field(
        default="yuvalkirstain/PickScore_v1", description="model folder, or hub id (safetensors)"
    )
    tokenizer: TokenizerPathOrHubId = Field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        description="folder of the tokenizer, or hub id",
    )

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or damaged folder is a UserError."""
        # what is loaded once
        model, words = self._loaded(device)
        side = model.config.vision_config.image_size
        reading = threading.Lock()
        preprocess = Preprocess(size=(side, side), mean=CLIP_MEAN, std=CLIP_STD)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            pixels = preprocess(media_BFCHW.flatten(0, 1).to(device))
            image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            with reading:
                length = model.config.text_config.max_position_embeddings
                tokens = words(
                    list(prompts),
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                ).to(device)
            text = model.text_projection(model.text_model(**tokens).pooler_output)
            unit_BFD = torch.nn.functional.normalize(image, dim=-1).unflatten(
                0, media_BFCHW.shape[:2]
            )
            cosine_BF = (unit_BFD * torch.nn.functional.normalize(text, dim=-1)[:, None]).sum(-1)
            return model.logit_scale.exp() * cosine_BF.mean(1)

        return scorer

    def _loaded(self, device: str) -> tuple[Any, Any]:
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import logging as transformers_logging

        # it would tear the run's own
        transformers_logging.disable_progress_bar()
        place = f"rewards.{self.title}"
        # a folder is read as it is, a hub id may be downloaded
        try:
            here = Path(self.path).is_dir()
            model: Any = CLIPModel.from_pretrained(
                self.path, use_safetensors=True, dtype=torch.float32, local_files_only=here
            )
            words = AutoTokenizer.from_pretrained(
                self.tokenizer, local_files_only=Path(self.tokenizer).is_dir()
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = read_reason(error)
            raise UserError(
                f"{place}: cannot load {self.path!r} and {self.tokenizer!r}: {reason}"
            ) from error
        return model.to(device).eval().requires_grad_(False), words
