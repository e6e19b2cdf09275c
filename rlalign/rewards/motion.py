"""A verifier for clips of moving shapes: it follows the objects of a caption in the pixels, without
any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from rlalign.core.finite import refuse
from rlalign.core.registry import UserError
from rlalign.data.motion import DIRECTIONS, FRAMES, Move, Pass, Scene, Turn, parse_caption
from rlalign.data.shapes import SIZE
from rlalign.rewards._claims import read_scene, share
from rlalign.rewards._tracks import CONTACT, Track, follow
from rlalign.rewards.base import Reward, Scorer
from rlalign.rewards.shapes import DetectedObject, detect_all

_LEAST_WAY = 3.0
"""Pixels of 32 that an object must have gone for its direction to count in full."""

_LONGEST_STEP = 3.6
"""Pixels of 32 from one frame to the next that are no jump; the fastest drawn object goes 2.9."""

_STEPS = FRAMES - 1
"""Speeds are told per step of a clip of 9 frames, however many frames a clip has."""

_SPEED_LIMITS = {
    "slowly": (0.2, 0.6, 1.15, 1.9),
    "fast": (1.15, 1.9, 3.0, 4.5),
    "moving": (0.3, 1.2, 3.3, 5.0),
}
"""Pixels of 32 per step: a speed is what its word says between the two limits in the middle, and
fades to nothing at the outer two. "moving" is for captions that do not say how fast."""

_STILL_LIMITS = (1.2, 4.0)
"""Pixels of 32 by which an object that stays may wander, and at which it does not stay at all."""

_SIDE = 7.0
"""Pixels of 32 along its way that an object must lie before, and then behind, the one it passes."""

_CLEARLY_BEHIND = 0.75
"""Share of what is hidden that must be of the object behind, for its side to count in full; at half
it counts nothing."""

_LEAST_HIDDEN = 0.1
"""Share of an object's area that must be hidden, on average over the frames of contact, for one to
have passed behind the other."""


class Motion(Reward):
    """Share of what a caption of moving shapes claims that a clip shows, 0 to 1: which objects,
    where to, how fast, in which order, on which side, unbroken and still there at the end.

    The mean of the components that ``components`` describes. Clips of two frames or more, of any
    size; lengths are measured in 32nds of the clip's side, speeds per frame of a clip of 9.

    Source: a rule-based verifier in the manner of GenEval (Ghosh 2023, arXiv:2310.11513), with
    dimensions as in VBench (Huang 2023, arXiv:2311.17982), on pixels instead of detectors.
    """

    differentiable: ClassVar[bool] = False
    of_clips: ClassVar[bool] = True

    def load(self, device: str) -> Scorer:
        """The scorer; it works on the CPU wherever the media are."""

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            scenes = [read_scene(parse_caption, one, self.name, "moving shapes") for one in prompts]
            refuse(media_BFCHW, "the policy's decoder")
            clips_BFHWC = media_BFCHW.detach().float().permute(0, 1, 3, 4, 2).cpu().numpy()
            scores = [
                share(components(scene, clip))
                for scene, clip in zip(scenes, clips_BFHWC, strict=True)
            ]
            return torch.tensor(scores, dtype=torch.float32)

        return scorer


def components(scene: Scene, clip_FHWC: np.ndarray) -> dict[str, float]:
    """What a caption claims -> how far a clip, uint8 or float in [0, 1], of shape (F, H, W, 3),
    bears it out, each 0 to 1.

    ``object`` (share of frames that show the objects in their colours and shapes), ``persistence``
    (share of neighbouring pairs of frames that both show just these, so that flicker counts twice),
    ``end`` (share of the last third of frames in which they are there), ``continuity`` (the longest
    step against what no jump is), ``direction``, ``speed``. A turn has ``order`` (the first way in
    the first half, the second in the second). A pass has ``stays`` (the still object wanders
    little) and ``side`` (what is hidden belongs to the object behind); its direction is from one
    side of the still object to the other. A clip without the objects bears out nothing.
    """
    frames = len(clip_FHWC)
    if frames < 2:
        raise UserError(
            f"rewards.motion needs clips of 2 frames or more, got {frames}; take rewards.shapes"
            " where a policy makes pictures"
        )
    scale = SIZE / clip_FHWC.shape[2]
    found = detect_all(clip_FHWC)
    if isinstance(scene, Pass):
        return _pass_claims(scene, found, scale)

    track = follow(scene.thing, found, scale)
    return _presence(found, np.zeros(len(found), dtype=bool), [track]) | _own_claims(scene, track)


def _own_claims(scene: Move | Turn, track: Track) -> dict[str, float]:
    """The claims about the way of a single object."""
    first_2, second_2 = _halves(track)
    net_2 = first_2 + second_2
    if isinstance(scene, Move):
        speed = float(np.linalg.norm(net_2)) / _STEPS
        return {
            "direction": _direction(net_2, np.array(DIRECTIONS[scene.direction])),
            "speed": _within(speed, _SPEED_LIMITS[scene.speed]),
        }
    towards_22 = np.array([DIRECTIONS[scene.first], DIRECTIONS[scene.second]])
    speed = float(np.linalg.norm(first_2) + np.linalg.norm(second_2)) / _STEPS
    return {
        "direction": _direction(net_2, towards_22.sum(axis=0)),
        "speed": _within(speed, _SPEED_LIMITS["moving"]),
        "order": _order(first_2 @ towards_22.T, second_2 @ towards_22.T),
    }


def _halves(track: Track) -> tuple[np.ndarray, np.ndarray]:
    """The ways (x, y) in the first and in the second half; none of what is seen once or never."""
    if track.seen_F.sum() < 2:
        return np.zeros(2), np.zeros(2)
    middle_2 = track.centre_F2[(len(track.centre_F2) - 1) // 2]
    return middle_2 - track.centre_F2[0], track.centre_F2[-1] - middle_2


def _direction(way_2: np.ndarray, target_2: np.ndarray) -> float:
    """The cosine of a way with where it should lead, at least 0; less for a way too short to tell
    from rest."""
    length = float(np.linalg.norm(way_2))
    cosine = float(way_2 @ target_2) / max(length * float(np.linalg.norm(target_2)), 1e-9)
    return max(0.0, cosine) * min(1.0, length / _LEAST_WAY)


def _within(value: float, limits: tuple[float, float, float, float]) -> float:
    """1 between the inner two limits, 0 outside the outer two, linear between."""
    return float(np.interp(value, limits, (0.0, 1.0, 1.0, 0.0)))


def _order(first_2: np.ndarray, second_2: np.ndarray) -> float:
    """How far an object goes the first way in the first half and the second in the second: what it
    goes so, less what it goes so in the wrong half, over all that it goes; at least 0.

    The arguments are how far it goes along the first and the second direction, in each half.
    """
    right = max(first_2[0], 0.0) + max(second_2[1], 0.0)
    wrong = max(first_2[1], 0.0) + max(second_2[0], 0.0)
    everything = float(np.abs(first_2).sum() + np.abs(second_2).sum())
    return float(max(0.0, (right - wrong) / max(everything, _LEAST_WAY)))


def _presence(
    found: Sequence[Sequence[DetectedObject]], contact_F: np.ndarray, tracks: Sequence[Track]
) -> dict[str, float]:
    """The claims of every caption: object, persistence, end, continuity.

    Where two objects are in contact (``contact_F``), hidden is not gone, and what is partly hidden
    may have any shape and be in pieces.
    """
    seen_NF = np.stack([track.seen_F for track in tracks])
    there_NF = seen_NF | (contact_F & seen_NF.any(axis=0))
    shaped_NF = np.stack([track.shaped_F for track in tracks])
    right_NF = there_NF & (shaped_NF | contact_F)

    # just these: as many pieces as objects
    alone_F = np.array([len(frame) for frame in found]) == len(tracks)
    good_F = right_NF.all(axis=0) & (alone_F | contact_F)
    last = -(-len(found) // 3)
    return {
        "object": float(right_NF.mean()),
        "persistence": float((good_F[1:] & good_F[:-1]).mean()),
        "end": float(there_NF[:, -last:].all(axis=0).mean()),
        "continuity": min(_continuity(track) for track in tracks),
    }


def _continuity(track: Track) -> float:
    """What is no jump over the longest step, at most 1; 0 for what is seen once or never."""
    if track.seen_F.sum() < 2:
        return 0.0
    longest = float(np.linalg.norm(track.step_F2, axis=1).max()) * _pace(track)
    return min(1.0, _LONGEST_STEP / max(longest, 1e-9))


def _pace(track: Track) -> float:
    """Factor from a way per frame to that of a clip of 9 frames."""
    return len(track.step_F2) / _STEPS


def _pass_claims(
    scene: Pass, found: Sequence[Sequence[DetectedObject]], scale: float
) -> dict[str, float]:
    """The claims about an object that stays and one that passes it."""
    still, mover = (follow(thing, found, scale) for thing in (scene.still, scene.mover))
    if min(still.seen_F.sum(), mover.seen_F.sum()) < 2:
        nothing = np.zeros(len(found), dtype=bool)
        own = dict.fromkeys(("direction", "speed", "stays", "side"), 0.0)
        return _presence(found, nothing, [still, mover]) | own
    apart_F = np.linalg.norm(mover.centre_F2 - still.centre_F2, axis=1)
    contact_F = apart_F < CONTACT * SIZE
    hidden = [_hidden(track, contact_F) for track in (still, mover)]
    still, mover = still.behind(contact_F), mover.behind(contact_F)

    # from one side of the still object to the other
    place_2 = np.median(still.centre_F2, axis=0)
    way_2 = mover.centre_F2[-1] - mover.centre_F2[0]
    net = float(np.linalg.norm(way_2))
    ahead = [float((p - place_2) @ way_2) / max(net, 1e-9) for p in mover.centre_F2[[0, -1]]]
    beside = np.clip([-ahead[0] / _SIDE, ahead[1] / _SIDE], 0.0, 1.0)
    wander = float(np.linalg.norm(still.centre_F2 - place_2, axis=1).max())
    return _presence(found, contact_F, [still, mover]) | {
        "direction": float(beside.prod()),
        "speed": _within(net / _STEPS, _SPEED_LIMITS["moving"]),
        "stays": float(np.interp(wander, _STILL_LIMITS, (1.0, 0.0))),
        "side": _side(*(hidden if scene.side == "in front of" else hidden[::-1])),
    }


def _hidden(track: Track, contact_F: np.ndarray) -> float:
    """Share of an object's area that is hidden, on average over the frames of contact."""
    if not contact_F.any():
        return 0.0
    return float((1.0 - track.area_F[contact_F] / track.whole_area).clip(0.0, 1.0).mean())


def _side(behind: float, before: float) -> float:
    """Whether what is hidden belongs to the object behind, from what is hidden of each."""
    both = behind + before
    share_behind = behind / max(both, 1e-9)
    clear = (share_behind - 0.5) / (_CLEARLY_BEHIND - 0.5)
    return float(np.clip(clear, 0.0, 1.0)) * min(1.0, both / _LEAST_HIDDEN)
