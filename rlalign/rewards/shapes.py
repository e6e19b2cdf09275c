"""A verifier for the drawn shapes: it reads the facts of a caption off the pixels, without any
model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from rlalign.core.finite import refuse
from rlalign.data.shapes import PALETTE, PLURALS, SIZE, Scene, coverage, parse_caption
from rlalign.rewards._claims import read_scene, share
from rlalign.rewards.base import Reward, Scorer

_BRIGHT = 0.45
"""A pixel belongs to an object when its largest channel exceeds this: about half the way from
ground to colour."""

_NEAR = 0.45
"""Largest distance of a pixel from its palette colour, both scaled to a largest channel of 1."""

_LEAST_AREA = 10 / SIZE**2
"""Share of the picture below which a component is a speck; the smallest triangle drawn has 24 /
1024."""

_LEAST_FIT = 0.65
"""Least overlap with the best shape; below it a blob has no shape. A drawn object blurred by 0.7
pixels has 0.73."""

_CLEARLY = 1 / SIZE
"""Share of the picture's side by which mean centroids must differ for a relation to hold."""


@dataclass(frozen=True, kw_only=True)
class DetectedObject:
    """One object found in a picture."""

    colour: str
    shape: str
    """A word for a shape, or "unclear"."""
    x: float
    """Centroid, pixels from the left."""
    y: float
    """Centroid, pixels from the top."""
    area: int
    """Pixels."""


class Shapes(Reward):
    """Share of a caption's facts (colours, numbers, shapes, relation, nothing else) that a picture
    of shapes shows, 0 to 1.

    Source: a rule-based verifier in the manner of GenEval (Ghosh 2023, arXiv:2310.11513), on pixels
    instead of a detector.
    """

    differentiable: ClassVar[bool] = False

    def load(self, device: str) -> Scorer:
        """The scorer; it works on the CPU wherever the media are. A clip's score is the mean over
        its frames."""

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            scenes = [read_scene(parse_caption, one, self.name, "shapes") for one in prompts]
            frames = media_BFCHW.shape[1]
            refuse(media_BFCHW, "the policy's decoder")
            images_NHWC = (
                media_BFCHW.detach().float().flatten(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            )
            size = (images_NHWC.shape[1], images_NHWC.shape[2])
            score_N = [
                share(facts(scenes[n // frames], found, size))
                for n, found in enumerate(detect_all(images_NHWC))
            ]
            return torch.tensor(score_N, dtype=torch.float32).reshape(-1, frames).mean(dim=1)

        return scorer


def facts(
    scene: Scene, detected: Sequence[DetectedObject], size: tuple[int, int] = (SIZE, SIZE)
) -> dict[str, bool]:
    """What a caption claims -> whether the objects found bear it out; ``size`` is (height, width)
    in pixels.

    Per group: ``colour`` (some object has it), ``number`` (so many objects have it), ``shape`` (all
    that have it are of that shape). For two groups ``relation`` (the mean centroid of the first
    lies left of, or above, that of the second). Always
    ``nothing else`` (as many objects as the caption says). A blank picture bears out nothing.
    """
    result: dict[str, bool] = {}
    middles: list[np.ndarray] = []
    for index, group in enumerate(scene.groups, start=1):
        own = [d for d in detected if d.colour == group.colour]
        result[f"group {index} colour"] = bool(own)
        result[f"group {index} number"] = len(own) == group.number
        result[f"group {index} shape"] = bool(own) and all(d.shape == group.shape for d in own)
        if own:
            middles.append(np.mean([(d.x, d.y) for d in own], axis=0))
    if scene.relation is not None:
        axis = 0 if scene.relation == "left of" else 1
        margin = _CLEARLY * (size[1], size[0])[axis]
        result["relation"] = len(middles) == 2 and bool(
            middles[1][axis] - middles[0][axis] > margin
        )
    result["nothing else"] = len(detected) == scene.objects
    return result


def detect(image_HWC: np.ndarray) -> list[DetectedObject]:
    """The objects of one picture, uint8 or float in [0, 1], of shape (H, W, 3)."""
    return detect_all(image_HWC[None])[0]


def detect_all(images_NHWC: np.ndarray) -> list[list[DetectedObject]]:
    """The objects of each picture, uint8 or float in [0, 1], of shape (N, H, W, 3).

    A pixel takes the palette colour that is nearest in direction (both scaled to a largest channel
    of 1, so that a dimmed edge keeps its hue); connected pixels of one colour are an object; its
    shape is the one whose drawing, of the same area and at the same centroid, overlaps best.
    """
    from scipy import ndimage

    scale = 255.0 if images_NHWC.dtype == np.uint8 else 1.0
    pixels_NHWC = (images_NHWC.astype(np.float32) / scale).clip(0.0, 1.0)
    count, height, width, _ = pixels_NHWC.shape
    colours_NHW = _colours(pixels_NHWC)
    names = tuple(PALETTE)
    masks_NPHW = colours_NHW[:, None] == np.arange(len(names))[None, :, None, None]
    # connected within a plane of one picture and one colour, never across planes
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = ndimage.generate_binary_structure(2, 1)
    labels_MHW = np.empty((count * len(names), height, width), dtype=np.int32)
    ndimage.label(masks_NPHW.reshape(labels_MHW.shape), structure=within, output=labels_MHW)
    bright_NHW = pixels_NHWC.max(axis=-1)
    ground_N = np.minimum(np.median(bright_NHW, axis=(1, 2)), _BRIGHT / 2)
    found: list[list[DetectedObject]] = [[] for _ in range(count)]
    for label, (plane, rows, columns) in enumerate(ndimage.find_objects(labels_MHW), start=1):
        own_HW = labels_MHW[plane.start] == label
        area = int(own_HW.sum())
        if area < _LEAST_AREA * height * width:
            continue
        image, colour = divmod(plane.start, len(PALETTE))
        # one pixel more on each side holds the dim half of the edge; other objects' pixels are not
        # this one's edge
        window = (_widen(rows, height), _widen(columns, width))
        bright_HW = bright_NHW[image][window]
        mine_HW = own_HW[window]
        full = np.quantile(bright_HW[mine_HW], 0.8)
        cover_HW = ((bright_HW - ground_N[image]) / (full - ground_N[image])).clip(0.0, 1.0)
        cover_HW = np.where(mine_HW | (colours_NHW[image][window] < 0), cover_HW, 0.0)
        y, x = (np.argwhere(own_HW).mean(axis=0) + 0.5).tolist()
        shape = _shape(cover_HW)
        found[image].append(DetectedObject(colour=names[colour], shape=shape, x=x, y=y, area=area))
    return found


def _widen(extent: slice, limit: int) -> slice:
    return slice(max(extent.start - 1, 0), min(extent.stop + 1, limit))


def _colours(pixels_NHWC: np.ndarray) -> np.ndarray:
    """(N, H, W) index into the palette, -1 for ground."""
    palette_PC = np.array(list(PALETTE.values()), dtype=np.float32)
    palette_PC /= palette_PC.max(axis=1, keepdims=True)
    bright_NHW = pixels_NHWC.max(axis=-1)
    result_NHW = np.full(bright_NHW.shape, -1)
    lit_NHW = bright_NHW > _BRIGHT
    hue_MC = pixels_NHWC[lit_NHW] / bright_NHW[lit_NHW][:, None]
    distance_MP = np.linalg.norm(hue_MC[:, None, :] - palette_PC[None], axis=-1)
    nearest_M = distance_MP.argmin(axis=1)
    result_NHW[lit_NHW] = np.where(distance_MP.min(axis=1) < _NEAR, nearest_M, -1)
    return result_NHW


def _shape(cover_HW: np.ndarray) -> str:
    """The shape whose drawing fits a map of covered pixels best: same area, same centroid, soft
    intersection over union."""
    height, width = cover_HW.shape
    area = cover_HW.sum()
    x = float((cover_HW * (np.arange(width) + 0.5)).sum() / area)
    y = float((cover_HW * (np.arange(height)[:, None] + 0.5)).sum() / area)
    fits = {}
    for shape, (unit_area, drop) in _unit_moments().items():
        half = float(np.sqrt(area / unit_area))
        drawn_HW = coverage(shape, x, y - drop * half, half, height, width)
        fits[shape] = float(
            np.minimum(drawn_HW, cover_HW).sum() / np.maximum(drawn_HW, cover_HW).sum()
        )
    best = max(fits, key=fits.__getitem__)
    return best if fits[best] >= _LEAST_FIT else "unclear"


@functools.lru_cache(maxsize=1)
def _unit_moments() -> dict[str, tuple[float, float]]:
    """Shape -> (area, how far below its centre its centroid lies) for half size 1, measured on a
    large drawing."""
    side = 256
    result = {}
    for shape in PLURALS:
        cover_HW = coverage(shape, side / 2, side / 2, side / 2, side, side)
        low = (cover_HW * (np.arange(side)[:, None] + 0.5)).sum() / cover_HW.sum()
        result[shape] = (float(cover_HW.sum()) / (side / 2) ** 2, float(low) / (side / 2) - 1.0)
    return result
