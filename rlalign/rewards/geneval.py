"""GenEval: whether a picture shows the objects, numbers, colours and positions that its prompt
names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.core.locations import ArchitecturePath, LocalPathOrHubId
from rlalign.core.media import as_uint8, to_image
from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError, nearest
from rlalign.networks.towers import Towers, published_towers
from rlalign.rewards._detectors import Detect, load_detector
from rlalign.rewards._geneval_rules import (
    COLOURS,
    Detection,
    Limits,
    Record,
    grade,
    is_correct,
    keep_all,
    read_record,
)
from rlalign.rewards.base import Reward, Scorer

_BACKGROUND = 0x99
"""Grey of what is not the object, where its colour is read."""


class GenEval(Reward):
    """Whether a detector finds in the picture what the prompt's record asks for, and CLIP sees the
    colours that it names.

    The record is a line of GenEval's evaluation_metadata.jsonl: tag, include, exclude. ``measure``
    is correct (GenEval's own verdict, 0 or 1), strict (0 or 1: exactly as often as asked for) or
    graded (how much of it, 1 at best; the score that Flow-GRPO trains on, negative where an object
    appears more than twice as often as asked for). Of a clip the mean over its frames.

    Weights: the published verdicts are of Mask2Former with Swin-S in mmdetection's weights; hub id
    facebook/mask2former-swin-small-coco-instance, the default, is the same network trained by its
    authors. Colours by hub id timm/vit_large_patch14_clip_224.openai.

    Source: Ghosh 2023, arXiv:2310.11513; graded: Liu 2025, arXiv:2505.05470.
    """

    detector: LocalPathOrHubId = Field(
        default="facebook/mask2former-swin-small-coco-instance",
        description="model folder or hub id, for object detection or instance segmentation",
    )
    architecture: ArchitecturePath = "ViT-L-14-quickgelu"
    weights: LocalPathOrHubId = Field(
        default="timm/vit_large_patch14_clip_224.openai",
        description="of CLIP: a .safetensors file, or a hub id with open_clip_model.safetensors",
    )
    measure: Literal["correct", "strict", "graded"] = Field(
        default="correct", description="the published verdict, or one of Flow-GRPO's two scores"
    )
    threshold: float = Field(
        default=0.3, ge=0, le=1, description="confidence that a detection must exceed"
    )
    counting_threshold: float = Field(
        default=0.9, ge=0, le=1, description='the same in the task "counting"'
    )
    max_objects: int = Field(default=16, ge=1, description="detections of a class, at most")
    max_overlap: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="overlap from which the less sure of two is dropped; 1 keeps all",
    )
    position_threshold: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of both sizes by which centres must differ to say where one is",
    )
    batch: int = Field(default=8, ge=1, description="pictures that the detector sees at once")

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing, damaged or foreign model is a UserError."""
        place = f"rewards.{self.title}"
        detect, classes = load_detector(self.detector, f"{place}.detector", device)
        towers = published_towers(self.architecture, self.weights, place, device)
        return _GenEvalScorer(self, detect, classes, towers)


class _GenEvalScorer:
    """A detector and CLIP under a reward's settings."""

    def __init__(
        self, reward: GenEval, detect: Detect, classes: Sequence[str], towers: Towers
    ) -> None:
        self._reward = reward
        self._detect = detect
        self._classes = list(classes)
        self._towers = towers
        self._limits = Limits(
            reward.threshold,
            reward.counting_threshold,
            reward.max_objects,
            reward.max_overlap,
            reward.position_threshold,
        )
        self._colours: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor:
        # a record that is wrong is said before anything is computed
        records = [self._record(prompt) for prompt in prompts]
        batch, frames = media_BFCHW.shape[:2]
        pictures_NCHW = as_uint8(media_BFCHW).reshape(batch * frames, *media_BFCHW.shape[2:])
        found = list[Mapping[str, list[Detection]]]()
        for start in range(0, len(pictures_NCHW), self._reward.batch):
            found += self._detect(pictures_NCHW[start : start + self._reward.batch])
        score_N = [
            self._score(picture_CHW, one, records[n // frames])
            for n, (picture_CHW, one) in enumerate(zip(pictures_NCHW, found, strict=True))
        ]
        return torch.tensor(score_N, dtype=torch.float32).reshape(batch, frames).mean(1)

    def _record(self, prompt: str) -> Record:
        """The prompt's record, of classes that the detector knows."""
        place = f"rewards.{self._reward.title}"
        record = read_record(record_of(prompt), place, prompt)
        for clause in (*record.include, *record.exclude):
            if clause.class_name not in self._classes:
                raise UserError(
                    f"{place}: the prompt {str(prompt)!r}: the detector knows no class"
                    f" {clause.class_name!r}; {nearest(clause.class_name, self._classes)}"
                )
        return record

    def _score(
        self, picture_CHW: np.ndarray, found: Mapping[str, list[Detection]], record: Record
    ) -> float:
        kept = keep_all(found, record.tag, self._limits)

        def colours(class_name: str, some: Sequence[Detection]) -> list[str]:
            return [self._colour(picture_CHW, one, class_name) for one in some]

        threshold = self._limits.position_threshold
        if self._reward.measure == "correct":
            return float(is_correct(record, kept, colours, threshold))
        strict, graded = grade(record, kept, colours, threshold)
        return float(strict) if self._reward.measure == "strict" else graded

    def _colour(self, picture_CHW: np.ndarray, one: Detection, class_name: str) -> str:
        """The colour that CLIP gives to what is inside the box, with the rest greyed out where
        there is a mask."""
        crop_CHW = torch.from_numpy(crop(picture_CHW, one)).float() / 255.0
        unit_D = self._towers.images(crop_CHW[None, None])[0, 0]
        cosine_C = self._classifier(class_name) @ unit_D
        return COLOURS[int(np.argmax(cosine_C.float().cpu().numpy()))]

    def _classifier(self, class_name: str) -> torch.Tensor:
        """(colours, D) unit vectors: each the mean over three captions."""
        if class_name not in self._colours:
            captions = [text for colour in COLOURS for text in _captions(colour, class_name)]
            text_CTD = self._towers.texts(captions).unflatten(0, (len(COLOURS), -1))
            self._colours[class_name] = torch.nn.functional.normalize(text_CTD.mean(1), dim=-1)
        return self._colours[class_name]


def _captions(colour: str, class_name: str) -> tuple[str, str, str]:
    return (
        f"a photo of a {colour} {class_name}",
        f"a photo of a {colour}-colored {class_name}",
        f"a photo of a {colour} object",
    )


def crop(picture_CHW: np.ndarray, one: Detection) -> np.ndarray:
    """What is inside a detection's box, uint8, with grey where its mask is not; black beyond the
    picture's edge, as Pillow crops. At least one pixel each way."""
    if one.mask_HW is not None:
        picture_CHW = np.where(one.mask_HW, picture_CHW, np.uint8(_BACKGROUND))
    left, top, right, bottom = (round(edge) for edge in one.box)
    box = (left, top, max(right, left + 1), max(bottom, top + 1))
    return np.asarray(to_image(picture_CHW).crop(box)).transpose(2, 0, 1).copy()
