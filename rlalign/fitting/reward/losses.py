"""What the two stages minimise, as functions of an update's number; all randomness is keyed by
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from rlalign.core.media import as_floats
from rlalign.data.pairs.reader import Pair, PairReader
from rlalign.data.shapes import draw, random_scene
from rlalign.diffusion.noise import generator
from rlalign.fitting.reward.settings import Fit, FitReward
from rlalign.networks.towers import Towers

Losses = Callable[[int], Iterator[torch.Tensor]]
"""Update -> the parts of its loss, one per forward pass; their sum is minimised."""


def contrastive_losses(towers: Towers, config: FitReward, keep: Callable[[str], bool]) -> Losses:
    """CLIP's symmetric contrastive loss (open_clip's own ``ClipLoss``) on freshly drawn pictures
    with kept captions."""
    from open_clip.loss import ClipLoss

    criterion = ClipLoss()

    def losses(update: int) -> Iterator[torch.Tensor]:
        # fresh scenes of captions that are not held out
        rng = generator("fit-reward", config.seed, "contrastive", update)
        captions: list[str] = []
        pictures: list[np.ndarray] = []
        while len(captions) < config.contrastive.batch:
            scene = random_scene(rng, "train")
            if keep(scene.caption):
                captions.append(scene.caption)
                pictures.append(draw(scene, rng).transpose(2, 0, 1)[None])

        # each picture must find its own caption in the batch
        media_BFCHW = to_media(pictures, config.device)
        yield criterion(
            towers.images(media_BFCHW)[:, 0], towers.texts(captions), towers.clip.logit_scale.exp()
        )

    return losses


def pair_losses(towers: Towers, config: FitReward, reader: PairReader) -> Losses:
    """The mean over an update's pairs, weighted per prompt, of the loss on pairs."""

    def losses(update: int) -> Iterator[torch.Tensor]:
        passes = list(reader.passes(update))
        whole = sum(weights(part, reader, config.fit).sum() for part in passes)
        for part in passes:
            score_0_B, score_1_B, label_0_B = scores(towers, part, config.device)
            value_B = pair_loss(score_0_B, score_1_B, label_0_B, config.fit.theta)
            yield (weights(part, reader, config.fit).to(value_B) * value_B).sum() / whole

    return losses


def pair_loss(
    score_0_B: torch.Tensor, score_1_B: torch.Tensor, label_0_B: torch.Tensor, theta: float
) -> torch.Tensor:
    """(B,) nats: Bradley-Terry's loss, or Rao-Kupper's where theta > 1."""
    if theta > 1.0:
        return rao_kupper_loss(score_0_B, score_1_B, label_0_B, theta)
    return bradley_terry_loss(score_0_B, score_1_B, label_0_B)


def weights(pairs: list[Pair], reader: PairReader, fit: Fit) -> torch.Tensor:
    """(B,) float32: 1 / usable pairs of the prompt, or 1."""
    return torch.tensor(
        [1.0 / reader.counts[p.caption] if fit.weight_by_prompt else 1.0 for p in pairs]
    )


def scores(
    towers: Towers, pairs: list[Pair], device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B,) scores of both pictures and label 0, from as few forward passes as the pictures' sizes
    allow."""
    captions = [p.caption for p in pairs]
    media = [p.media_0 for p in pairs] + [p.media_1 for p in pairs]
    if len({one.shape for one in media}) == 1:
        score_N = towers(to_media(media, device), captions * 2)
    else:
        each = zip(media, captions * 2, strict=True)
        score_N = torch.cat([towers(to_media([one], device), [caption]) for one, caption in each])
    label_0_B = torch.tensor([p.label_0 for p in pairs], device=score_N.device)
    return score_N[: len(pairs)], score_N[len(pairs) :], label_0_B


def to_media(media: list[np.ndarray], device: str) -> torch.Tensor:
    """uint8 pictures or clips (F, 3, H, W) -> media (B, F, 3, H, W) in [0, 1]."""
    return as_floats(np.stack(media), device)


def bradley_terry_loss(
    score_0_B: torch.Tensor, score_1_B: torch.Tensor, label_0_B: torch.Tensor
) -> torch.Tensor:
    """(B,) nats: cross-entropy of sigmoid(score_0 - score_1) against the share of wins that picture
    0 has.

    With label 1 it is -log sigmoid(r_w - r_l) (Bradley & Terry 1952, Biometrika 39); a tie has
    label 1/2, the cross-entropy against (1/2, 1/2), which is ln 2 at equal scores (PickScore's
    form: Kirstain 2023, arXiv:2305.01569). Adding a constant to both scores changes nothing.
    """
    logit_B = score_0_B - score_1_B
    return -(label_0_B * F.logsigmoid(logit_B) + (1.0 - label_0_B) * F.logsigmoid(-logit_B))


def rao_kupper(
    difference_B: torch.Tensor, theta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B,) probabilities that 0 wins, that 1 wins, and of a tie, at score difference d = score_0 -
    score_1.

    P(0) = 1 / (1 + theta e^-d), P(1) = 1 / (1 + theta e^d), P(tie) = (theta^2 - 1) P(0) P(1); they
    sum to 1, and theta = 1 is Bradley-Terry without ties (Rao & Kupper 1967, JASA 62, eq. 2.3).
    Needs theta >= 1.
    """
    shift = math.log(theta)
    first_B = torch.sigmoid(difference_B - shift)
    second_B = torch.sigmoid(-difference_B - shift)
    return first_B, second_B, (theta**2 - 1.0) * first_B * second_B


def rao_kupper_loss(
    score_0_B: torch.Tensor, score_1_B: torch.Tensor, label_0_B: torch.Tensor, theta: float
) -> torch.Tensor:
    """(B,) nats: minus the log probability of what was seen (0 wins: label 1; 1 wins: 0; a tie:
    1/2). Needs theta > 1."""
    shift = math.log(theta)
    difference_B = score_0_B - score_1_B
    first_B = F.logsigmoid(difference_B - shift)
    second_B = F.logsigmoid(-difference_B - shift)
    tie_B = math.log(theta**2 - 1.0) + first_B + second_B
    return -torch.where(label_0_B == 0.5, tie_B, torch.where(label_0_B > 0.5, first_B, second_B))
