"""Human Preference Score v3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from rlalign.core.locations import LocalPath, LocalPathOrHubId
from rlalign.networks.towers import hub_file
from rlalign.rewards._hpsv3_network import read_network
from rlalign.rewards.base import Reward, Scorer


class HpsV3(Reward):
    """The mean of what people would score a picture and its caption, by Qwen2-VL-7B with a head
    that gives a mean and a spread; plus ``spread_weight`` times the spread.

    About 0 to 12. A picture is resized to about 256 x 28 x 28 pixels. Of a clip the mean over its
    frames. Gradients reach the picture. Needs 17 GB in bfloat16, as published. The text that the
    network is told with every picture is a part of the published score and not of rlalign:
    ``instruction`` names the authors' file hpsv3/dataset/data_collator_qwen.py, of which two
    strings are read and nothing is run, or a text file of your own.

    Weights: HPSv3.safetensors of hub id MizzenAI/HPSv3; the configuration and tokenizer of hub id
    Qwen/Qwen2-VL-7B-Instruct.

    Source: Ma 2025, arXiv:2508.03789.
    """

    differentiable: ClassVar[bool] = True

    instruction: LocalPath = Field(
        description="the authors' data_collator_qwen.py, or a text with {text_prompt}, <|Reward|>"
    )
    weights: LocalPathOrHubId = Field(
        default="MizzenAI/HPSv3",
        description="a .safetensors file, or a hub id with HPSv3.safetensors",
    )
    base: LocalPathOrHubId = Field(
        default="Qwen/Qwen2-VL-7B-Instruct",
        description="folder or hub id of the configuration and the tokenizer",
    )
    spread_weight: float = Field(
        default=0.0,
        allow_inf_nan=False,
        description="factor of the spread; below 0 what is uncertain scores less",
    )
    precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the network; the head is float32"
    )
    batch: int = Field(default=8, ge=1, description="pictures that the network sees at once")

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing, damaged or foreign file is a UserError."""
        place = f"rewards.{self.title}"
        file = hub_file(self.weights, "HPSv3.safetensors", f"{place}.weights")
        dtype = getattr(torch, self.precision)
        network = read_network(self.base, file, self.instruction, dtype, place).to(device)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            batch, frames = media_BFCHW.shape[:2]
            pictures_NCHW = media_BFCHW.flatten(0, 1).to(device)
            captions = [prompt for prompt in prompts for _ in range(frames)]
            made_N2 = torch.cat(
                [
                    network(pictures_NCHW[i : i + self.batch], captions[i : i + self.batch])
                    for i in range(0, batch * frames, self.batch)
                ]
            )
            mean_N, log_spread_N = made_N2.unbind(1)
            score_N = mean_N
            if self.spread_weight:
                score_N = score_N + self.spread_weight * log_spread_N.exp()
            return score_N.unflatten(0, (batch, frames)).mean(1)

        return scorer
