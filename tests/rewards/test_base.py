"""What happens when a score fails, and how scores make one number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError, build
from rlalign.rewards.base import Reward, score, total

PROMPTS = ("dark", "grey", "light")
MEDIA = np.stack([np.full((1, 3, 2, 2), v, dtype=np.uint8) for v in (0, 51, 255)])


class Brightness(Reward):
    """The mean of a picture's pixels. Source: a test's own."""

    def load(self, device):
        return brightness


def brightness(media_BFCHW, prompts):
    return media_BFCHW.mean((1, 2, 3, 4))


def missing_when_dark(media_BFCHW, prompts):
    """NaN for a black picture."""
    value_B = brightness(media_BFCHW, prompts)
    return torch.where(value_B > 0, value_B, torch.nan)


def fails_when_dark(media_BFCHW, prompts):
    """Raises if any picture is black."""
    if (brightness(media_BFCHW, prompts) == 0).any():
        raise RuntimeError("too dark")
    return brightness(media_BFCHW, prompts)


def test_a_scorer_sees_float_pixels_in_0_to_1_and_the_prompts():
    seen = {}

    def scorer(media_BFCHW, prompts):
        seen.update(media=media_BFCHW, prompts=prompts)
        return brightness(media_BFCHW, prompts)

    score_B = score(Brightness(), scorer, MEDIA, PROMPTS)
    assert seen["prompts"] == PROMPTS
    assert seen["media"].dtype == torch.float32
    assert seen["media"].shape == MEDIA.shape
    np.testing.assert_allclose(score_B, [0.0, 0.2, 1.0], rtol=1e-6)
    assert score_B.dtype == np.float32


def test_a_scorer_cannot_change_the_media():
    """Media may be a read-only view of shared memory."""
    media = MEDIA.copy()
    media.flags.writeable = False

    def scorer(media_BFCHW, prompts):
        media_BFCHW.zero_()
        return brightness(media_BFCHW, prompts)

    score(Brightness(), scorer, media, PROMPTS)
    assert np.array_equal(media, MEDIA)


def test_raise_names_the_reward_the_prompt_and_the_way_out():
    with pytest.raises(
        UserError,
        match=r"rewards\.mine returned nan for 'dark'; set its on_error to drop or to a number",
    ):
        score(Brightness(label="mine"), missing_when_dark, MEDIA, PROMPTS)


def test_raise_lets_the_scorers_own_error_through():
    with pytest.raises(RuntimeError, match="too dark"):
        score(Brightness(), fails_when_dark, MEDIA, PROMPTS)


@pytest.mark.parametrize("scorer", [missing_when_dark, fails_when_dark])
def test_drop_marks_the_bad_sample_and_keeps_the_others(scorer):
    score_B = score(Brightness(on_error="drop"), scorer, MEDIA, PROMPTS)
    assert math.isnan(score_B[0])
    np.testing.assert_allclose(score_B[1:], [0.2, 1.0], rtol=1e-6)


@pytest.mark.parametrize("scorer", [missing_when_dark, fails_when_dark])
def test_a_value_stands_in_for_the_bad_sample(scorer):
    score_B = score(Brightness(on_error=-2.5), scorer, MEDIA, PROMPTS)
    np.testing.assert_allclose(score_B, [-2.5, 0.2, 1.0], rtol=1e-6)
    assert score_B.dtype == np.float32


@pytest.mark.parametrize("on_error", ["raise", "drop", 0.0])
def test_infinity_is_a_failed_score(on_error):
    def scorer(media_BFCHW, prompts):
        return torch.tensor([math.inf, 1.0, -math.inf])

    if on_error == "raise":
        with pytest.raises(UserError, match="returned inf for 'dark'"):
            score(Brightness(on_error=on_error), scorer, MEDIA, PROMPTS)
    else:
        expected = [math.nan, 1.0, math.nan] if on_error == "drop" else [0.0, 1.0, 0.0]
        np.testing.assert_array_equal(
            score(Brightness(on_error=on_error), scorer, MEDIA, PROMPTS), expected
        )


@pytest.mark.parametrize("on_error", ["raise", "drop", 0.0])
def test_a_wrong_shape_is_an_error_under_every_policy(on_error):
    with pytest.raises(
        UserError, match=r"rewards\..*Brightness must return shape \(3,\), got \(3, 1\)"
    ):
        score(Brightness(on_error=on_error), lambda m, p: brightness(m, p)[:, None], MEDIA, PROMPTS)


@pytest.mark.parametrize("on_error", ["drop", 0.0])
def test_a_users_mistake_is_an_error_under_every_policy(on_error):
    def scorer(media_BFCHW, prompts):
        raise UserError("no such checkpoint")

    with pytest.raises(UserError, match="no such checkpoint"):
        score(Brightness(on_error=on_error), scorer, MEDIA, PROMPTS)


def test_on_error_takes_two_words_or_a_number():
    assert build("rewards", {"name": "shapes", "on_error": 0}).on_error == 0.0
    with pytest.raises(
        UserError, match=r"^rewards\[1\]\.on_error must be 'raise' or 'drop'.*, got 'skip'$"
    ):
        build("rewards", {"name": "shapes", "on_error": "skip"}, "rewards[1]")


def test_the_title_is_the_label_or_the_name():
    assert build("rewards", {"name": "shapes"}).title == "shapes"
    assert build("rewards", {"name": "shapes", "label": "strict"}).title == "strict"
    assert Brightness().title == "Brightness"


def test_the_total_is_the_weighted_sum():
    rewards = (Brightness(label="a", weight=2.0), Brightness(label="b", weight=-0.5))
    raw = {
        "a": np.array([1, 2], dtype=np.float32),
        "b": np.array([4, 8], dtype=np.float32),
        "other": np.zeros(2),
    }
    found = total(rewards, raw)
    assert found.tolist() == [0.0, 0.0]
    assert found.dtype == np.float32


def test_a_sample_without_one_of_its_scores_has_no_total():
    rewards = (Brightness(label="a"), Brightness(label="b", weight=0.0))
    raw = {"a": np.array([1, 2], dtype=np.float32), "b": np.array([math.nan, 8], dtype=np.float32)}
    np.testing.assert_array_equal(total(rewards, raw), [math.nan, 2.0])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_is_finite(weight):
    with pytest.raises(UserError, match="weight must be a finite number"):
        build("rewards", {"name": "shapes", "weight": weight})


def test_a_product_has_weights_as_powers():
    rewards = [Brightness(label="a", weight=2.0), Brightness(label="b", weight=0.5)]
    raw = {
        "a": np.array([3.0, 0.0, 0.5, math.nan], dtype=np.float32),
        "b": np.array([16.0, 4.0, 0.0, 1.0], dtype=np.float32),
    }
    found = total(rewards, raw, "product")
    np.testing.assert_array_equal(found, np.array([36.0, 0.0, 0.0, math.nan], dtype=np.float32))
    assert found.dtype == np.float32


def test_a_weight_of_0_leaves_a_score_out_of_a_product_and_not_the_dropped_sample():
    rewards = [Brightness(label="a"), Brightness(label="b", weight=0.0)]
    raw = {
        "a": np.array([3.0, 2.0, 1.0], dtype=np.float32),
        "b": np.array([0.0, 9.0, math.nan], dtype=np.float32),
    }
    np.testing.assert_array_equal(total(rewards, raw, "product"), [3.0, 2.0, math.nan])


def test_a_product_of_negative_scores_is_refused():
    raw = {"a": np.array([0.5, -1.25], dtype=np.float32)}
    with pytest.raises(UserError, match=r"rewards\.a must be >= 0 under .* got -1\.25; take"):
        total([Brightness(label="a")], raw, "product")


def test_the_total_of_normalised_rewards_is_shown_as_their_sum():
    rewards = [Brightness(label="a", weight=2.0), Brightness(label="b")]
    raw = {"a": np.array([1.0, 2.0], dtype=np.float32), "b": np.array([5.0, 7.0], dtype=np.float32)}
    np.testing.assert_array_equal(total(rewards, raw, "normalised"), total(rewards, raw))
