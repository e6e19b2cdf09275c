"""VideoReward, the three scores of VideoAlign."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from rlalign.core.clips import RATE
from rlalign.core.locations import LocalPath, LocalPathOrHubId
from rlalign.core.registry import UserError
from rlalign.networks.towers import hub_file
from rlalign.rewards._videoalign_network import (
    DIMENSIONS,
    read_network,
    read_published,
    sample_frames,
)
from rlalign.rewards.base import Reward, Scorer


class VideoAlign(Reward):
    """What people would say of a clip and its caption, by Qwen2-VL-2B with a head that reads visual
    quality (VQ), motion quality (MQ) and text alignment (TA) off three tokens of one text.

    Each about -3 to 3, less the mean and over the standard deviation that model_config.json states
    of it; ``score`` is one of them, or their sum. For all three in the metrics, name the reward
    once for each with a ``label``, those that are not trained on with ``weight: 0``. A clip of
    2 frames or more is seen at 2 frames a second, 4 frames at least, as evenly spread as they are;
    a frame is resized to between 128 x 28 x 28 and 256 x 28 x 28 pixels. Gradients reach the
    clip. Needs 5 GB in bfloat16.

    The text that the network is told is the authors' and not a part of rlalign: ``instruction``
    names their prompt_template.py, of which one string is read and nothing is run, or a text file
    of your own. Weights: checkpoint-11352/model.pth of hub id KwaiVGI/VideoReward, a pickle that
    ``rlalign convert`` turns into safetensors; a LoRA in it is merged.

    Source: Liu 2025, arXiv:2501.13918.
    """

    differentiable: ClassVar[bool] = True
    of_clips: ClassVar[bool] = True

    weights: LocalPath = Field(
        description="the published model.pth as rlalign convert writes it, a .safetensors file"
    )
    instruction: LocalPath = Field(
        description=(
            "the authors' prompt_template.py, or a text with {text_prompt} and <|VQ_reward|>,"
            " <|MQ_reward|>, <|TA_reward|>"
        )
    )
    config: LocalPathOrHubId = Field(
        default="KwaiVGI/VideoReward",
        description="the model_config.json beside the weights, or a hub id with it",
    )
    base: LocalPathOrHubId = Field(
        default="Qwen/Qwen2-VL-2B-Instruct",
        description="folder or hub id of the configuration and the tokenizer",
    )
    score: Literal["overall", "VQ", "MQ", "TA"] = Field(
        default="overall", description="which score is the reward; overall is the sum of the three"
    )
    normalise: bool = Field(
        default=True,
        description="less the published mean, over the published standard deviation; or as it is",
    )
    rate: float = Field(
        default=RATE, gt=0.0, allow_inf_nan=False, description="frames a second of the clips"
    )
    precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="of the network; the head is float32"
    )
    batch: int = Field(default=4, ge=1, description="clips that the network sees at once")

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing, damaged or foreign file is a UserError."""
        place = f"rewards.{self.title}"
        file = hub_file(self.config, "model_config.json", f"{place}.config")
        said = read_published(file, f"{place}.config")
        if self.normalise and said.mean_3 is None:
            raise UserError(
                f"{place}.normalise must be false where {file} has no inference_config, got true"
            )
        dtype = getattr(torch, self.precision)
        weights = Path(self.weights)
        network = read_network(self.base, weights, self.instruction, said, dtype, place).to(device)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            frames = media_BFCHW.shape[1]
            if frames < 2:
                raise UserError(
                    f"{place} needs clips of 2 frames or more, got {frames}; take hpsv3 where a"
                    " policy makes pictures"
                )
            seen = sample_frames(frames, self.rate, said.sampled_rate)
            clips_NFCHW = media_BFCHW[:, seen].to(device)
            made_N3 = torch.cat(
                [
                    network(clips_NFCHW[i : i + self.batch], prompts[i : i + self.batch])
                    for i in range(0, len(prompts), self.batch)
                ]
            )
            if self.normalise:
                assert said.mean_3 is not None and said.std_3 is not None
                made_N3 = (made_N3 - said.mean_3.to(device)) / said.std_3.to(device)
            if self.score == "overall":
                return made_N3.sum(dim=1)
            return made_N3[:, DIMENSIONS.index(self.score)]

        return scorer
