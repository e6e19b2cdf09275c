"""What a denoiser is trained on: drawn pictures of an embedded task, and their captions."""

from __future__ import annotations

import numpy as np
import torch

from rlalign.data import motion, shapes, words
from rlalign.diffusion.noise import generator
from rlalign.fitting.denoiser.settings import Pretrain, Task

SIZE = shapes.SIZE
"""Pixels on a side, in every task."""
CAPTION_WORDS: dict[Task, tuple[str, ...]] = {
    "shapes": shapes.CAPTION_WORDS,
    "words": words.CAPTION_WORDS,
    "motion": motion.CAPTION_WORDS,
}
"""Task -> the words that its captions are made of; each is one token."""
CAPTION_MARKS: dict[Task, str] = {
    "shapes": "",
    "words": words.CAPTION_MARKS,
    "motion": motion.CAPTION_MARKS,
}
"""Task -> the marks that its captions contain."""


def pictures(config: Pretrain) -> tuple[torch.Tensor, list[str]]:
    """(N, 3, 32, 32) uint8 and their captions, each picture keyed by its number."""
    pictures_NHWC = np.empty((config.images, SIZE, SIZE, 3), dtype=np.uint8)
    captions = []
    for n in range(config.images):
        rng = generator("pretrain", config.seed, "picture", n)
        picture_HWC, caption = _drawn(config, rng)
        pictures_NHWC[n] = faded(picture_HWC, rng) if rng.random() < config.faded else picture_HWC
        captions.append(caption)
    return torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2).contiguous(), captions


def clips(config: Pretrain) -> tuple[torch.Tensor, list[str]]:
    """(N, 3, 9, 32, 32) uint8 and their captions, each clip keyed by its number; some move
    otherwise than their caption says."""
    clips_NFHWC = np.empty((config.images, motion.FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    captions = []
    for n in range(config.images):
        rng = generator("pretrain", config.seed, "clip", n)
        scene = motion.random_scene(rng, "train")
        wrong = rng.random() < config.wrong_motion
        clip_FHWC = motion.draw(motion.change_motion(scene, rng) if wrong else scene, rng)
        clips_NFHWC[n] = faded(clip_FHWC, rng) if rng.random() < config.faded else clip_FHWC
        captions.append(scene.caption)
    return torch.from_numpy(clips_NFHWC).permute(0, 4, 1, 2, 3).contiguous(), captions


def _drawn(config: Pretrain, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(32, 32, 3) uint8 of the train split and its caption, which a misspelt word does not bear
    out."""
    if config.task == "shapes":
        scene = shapes.random_scene(rng, "train")
        return shapes.draw(scene, rng), scene.caption
    word = words.random_word(rng, "train")
    written = words.misspell(word, rng) if rng.random() < config.misspelt else word
    return words.draw(written, rng), words.caption(word)


def faded(picture_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with its contrast against the ground reduced to 0.2 - 0.45: a viewer no longer
    tells the colours."""
    ground_C = np.median(picture_HWC.reshape(-1, 3), axis=0)
    return (ground_C + (picture_HWC - ground_C) * rng.uniform(0.2, 0.45)).round().astype(np.uint8)
