"""A picture reward over the frames of a clip: mean, minimum, quantile or the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlalign.core.registry import UserError
from rlalign.rewards._frames import FramesScorer
from rlalign.rewards.base import Reward, Scorer

GREYS = (0.2, 1.0, 0.0, 0.4)
"""Of the frames of the first clip; the second's are twice as dark."""


class Grey(Reward):
    """The mean brightness of the first frame that it is shown, plus 10 for the prompt "b"."""

    def load(self, device: str) -> Scorer:
        class Live:
            weight = 1.0

            def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /):
                added_B = torch.tensor([10.0 if p == "b" else 0.0 for p in prompts])
                return self.weight * media_BFCHW[:, 0].mean(dim=(1, 2, 3)) + added_B

            def set_weights(self, tensors: Mapping[str, torch.Tensor], /) -> None:
                self.weight = float(tensors["w"])

        return Live()


def media() -> torch.Tensor:
    clip = torch.tensor(GREYS).reshape(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2)
    return torch.cat([clip, clip / 2.0])


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        (None, (0.2, 0.1)),
        ("first", (0.2, 0.1)),
        ("mean", (0.4, 0.2)),
        ("min", (0.0, 0.0)),
        ({"quantile": 0.5}, (0.3, 0.15)),
        ({"quantile": 1.0}, (1.0, 0.5)),
    ],
)
def test_a_clips_score_is_made_of_its_frames_scores(frames: Any, wanted: tuple) -> None:
    reward = Grey.model_validate({"frames": frames})
    got = reward.load_scorer("cpu")(media(), ["a", "b"]) - torch.tensor([0.0, 10.0])
    assert got.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("frames", ["mean", "min", {"quantile": 0.5}])
def test_gradients_reach_the_frames_that_count(frames: Any) -> None:
    clips = media().requires_grad_()
    scorer = Grey.model_validate({"frames": frames}).load_scorer("cpu")
    (gradient,) = torch.autograd.grad(scorer(clips, ["a", "a"]).sum(), clips)
    touched = gradient[0].abs().sum(dim=(1, 2, 3)) > 0
    wanted = {"mean": [True] * 4, "min": [False, False, True, False]}
    assert touched.tolist() == wanted.get(str(frames), [True, False, False, True])


def test_new_weights_reach_the_scorer_behind() -> None:
    scorer: Any = Grey.model_validate({"frames": "mean"}).load_scorer("cpu")
    scorer.set_weights({"w": torch.tensor(2.0)})
    assert scorer(media(), ["a", "a"]).tolist() == pytest.approx([0.8, 0.4])


def test_a_missing_frame_makes_the_clip_missing_and_a_wrong_shape_is_told() -> None:
    reward = Grey.model_validate({"frames": "min", "on_error": "drop"})
    scorer = reward.load_scorer("cpu")
    broken = media()
    broken[1, 2] = torch.nan
    assert torch.isfinite(scorer(broken, ["a", "a"])).tolist() == [True, False]
    wrong = FramesScorer("grey", lambda media, prompts: torch.zeros(1), "mean")
    with pytest.raises(UserError, match=r"rewards.grey must return shape \(8,\) of as many frames"):
        wrong(media(), ["a", "a"])


@pytest.mark.parametrize("frames", ["median", {"quantile": 1.5}, {"quantile": 0.5, "of": 3}])
def test_what_is_no_way_to_reduce_frames_is_refused(frames: Any) -> None:
    with pytest.raises(ValidationError, match="frames"):
        Grey.model_validate({"frames": frames})
