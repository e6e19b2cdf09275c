"""Preference pairs out of scored samples: a round's own pictures or clips, ranked by their total
reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rlalign.core.clips import RATE, encode_clip
from rlalign.core.media import encode_image, to_image
from rlalign.core.prompts import dump_record, record_of
from rlalign.core.records import Scored, prompts_of

Every = Literal["best_and_worst", "all"]
Encoding = Literal["png", "jpeg"]


def pairs_of(
    scored: Sequence[Scored], every: Every = "best_and_worst", encoding: Encoding = "png"
) -> Iterator[dict[str, Any]]:
    """Rows for ``rlalign.data.pairs.columns.write_pairs``: per prompt the best and the worst
    sample, or all pairs of its samples.

    Labels go by the total reward, equal totals are a tie of 0.5 each; samples with a missing score
    take no part. Picture 0 is the sample that came first, so that its place says nothing about its
    label. Where any prompt has a record, each row has its caption's. PNG is lossless; JPEG is of
    quality 95; a clip is lossless WebP whatever the encoding, and its row says its frames and its
    rate. ``scored`` must carry its media.
    """
    groups: dict[int, list[tuple[str, str, float, np.ndarray]]] = defaultdict(list)
    has_records = any(map(record_of, prompts_of(one.unit for one in scored)))

    # samples of one prompt, whatever unit they are of
    for one in scored:
        assert one.media_BFCHW is not None, f"unit {one.unit.key} came without its media"
        for i in np.flatnonzero(one.kept_B).tolist():
            uid = f"{one.unit.key}/{one.unit.prompt_ids[i]}/{one.unit.sample_ids[i]}"
            sample = (one.unit.prompts[i], uid, float(one.total_B[i]), one.media_BFCHW[i])
            groups[one.unit.prompt_ids[i]].append(sample)

    # their pairs
    for number, samples in groups.items():
        for a, b in _chosen([score for _, _, score, _ in samples], every):
            (caption, uid_0, score_0, media_0) = samples[a]
            (_, uid_1, score_1, media_1) = samples[b]
            label_0 = 0.5 if score_0 == score_1 else float(score_0 > score_1)
            yield {
                "caption": caption,
                "jpg_0": encode_media(media_0, encoding),
                "jpg_1": encode_media(media_1, encoding),
                "label_0": label_0,
                "label_1": 1.0 - label_0,
                "are_different": not np.array_equal(media_0, media_1),
                "has_label": True,
                "image_0_uid": uid_0,
                "image_1_uid": uid_1,
                "ranking_id": number,
                **facts_of_clips(len(media_0)),
                **({"record": dump_record(caption)} if has_records else {}),
            }


def _chosen(scores: Sequence[float], every: Every) -> list[tuple[int, int]]:
    """Pairs of indices, the smaller first."""
    if len(scores) < 2:
        return []
    if every == "all":
        return list(combinations(range(len(scores)), 2))
    best = int(np.argmax(scores))
    worst = int(np.argmin(scores))
    if best == worst:  # all are equal
        best = 0
        worst = len(scores) - 1
    return [(min(best, worst), max(best, worst))]


def facts_of_clips(frames: int) -> dict[str, Any]:
    """The columns that a row has where its sides are clips of so many frames; none of pictures."""
    return {"frames": frames, "rate": RATE} if frames > 1 else {}


def encode_media(media_FCHW: np.ndarray, encoding: Encoding = "png") -> bytes:
    """The bytes of a picture's file, or of a clip's: lossless WebP."""
    if len(media_FCHW) == 1:
        return encode(media_FCHW[0], encoding)
    return encode_clip(media_FCHW)[0]


def encode(picture_CHW: np.ndarray, encoding: Encoding = "png") -> bytes:
    """A uint8 picture (3, H, W) as the bytes of a PNG or of a JPEG of quality 95."""
    settings = {"quality": 95} if encoding == "jpeg" else {}
    return encode_image(to_image(picture_CHW), encoding, **settings)
