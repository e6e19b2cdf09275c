"""The OCR reward on drawn text: what PP-OCR reads, and that it repeats."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError, build
from rlalign.data import words
from rlalign.rewards.base import Scorer, score
from rlalign.rewards.ocr import Ocr
from tests.rewards.drawn_text import draw_text

HELLO = Prompt("a sign", {"text": "Hello"})


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """It looks for lines."""
    return Ocr().load("cpu")


def score_of(scorer: Scorer, picture_FCHW: np.ndarray, prompt: str = HELLO) -> float:
    return float(scorer(torch.from_numpy(picture_FCHW[None]).float() / 255.0, [prompt])[0])


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"angle": 15},
        {"pixels": 9, "size": (24, 48)},
        {"noise": 60.0},
        {"light_on_dark": True},
        {"size": (200, 320), "pixels": 60},
    ],
    ids=["plain", "rotated", "small", "noisy", "light on dark", "large"],
)
def test_it_reads_drawn_text(scorer: Scorer, how: dict) -> None:
    picture = draw_text("HELLO", **how)
    assert score_of(scorer, picture) == 1.0
    assert score_of(scorer, picture, 'a sign "JELLY"') == pytest.approx(0.6)
    assert score_of(scorer, picture, 'a sign "WIND"') == 0.0


def test_it_reads_lines_from_top_to_bottom_and_accents(scorer: Scorer) -> None:
    assert score_of(scorer, draw_text("HELLO\nWORLD", size=(128, 192)), '"Hello World"') == 1.0
    assert score_of(scorer, draw_text("CAFÉ"), '"Café"') == 1.0


def test_what_it_cannot_read_scores_0(scorer: Scorer) -> None:
    """A blank picture, and a script that its weights do not know: no error."""
    assert score_of(scorer, np.full((1, 3, 64, 64), 255, dtype=np.uint8)) == 0.0
    assert score_of(scorer, np.zeros((1, 3, 5, 3), dtype=np.uint8)) == 0.0
    assert score_of(scorer, draw_text("ДОМ"), '"ДОМ"') == 0.0


def test_a_clip_scores_the_mean_over_its_frames(scorer: Scorer) -> None:
    clip = np.concatenate([draw_text("HELLO"), draw_text("HELO"), draw_text("")])
    assert score_of(scorer, clip) == pytest.approx((1.0 + 0.8 + 0.0) / 3)


def test_a_score_does_not_depend_on_its_batch(scorer: Scorer) -> None:
    texts = ["HELLO", "HE", "HELLO DEAR FRIENDS", "HELP", ""]
    media = np.stack([draw_text(text, pixels=16, noise=30.0) for text in texts])
    together = score(Ocr(), scorer, media, [HELLO] * len(texts))
    alone = [score(Ocr(), scorer, one[None], [HELLO])[0] for one in media]
    assert together.dtype == np.float32 and together.tolist() == alone
    assert together.tolist() == score(Ocr(), Ocr().load("cpu"), media, [HELLO] * 5).tolist()


@pytest.mark.promise
def test_the_words_of_the_embedded_task_are_read() -> None:
    """Two dozen drawn words as one line each, at both widths of the recogniser: all of them, 0.95
    is asked for. With noise less is read; another word's score is far below."""
    rng = np.random.default_rng(0)
    drawn = [words.random_word(rng, "held_out") for _ in range(24)]
    media = np.stack([words.draw(w, rng).transpose(2, 0, 1)[None] for w in drawn])
    prompts = [words.caption(word) for word in drawn]
    noisy = np.clip(media + rng.normal(0.0, 110.0, media.shape), 0, 255).astype(np.uint8)
    for width in (96, 320):
        reward = Ocr(detect=False, zoom=1.5, line_width=width)
        live = reward.load("cpu")
        clean = score(reward, live, media, prompts).mean()
        assert clean > 0.95
        assert 0.1 < score(reward, live, noisy, prompts).mean() < clean - 0.1
        assert score(reward, live, media, prompts[1:] + prompts[:1]).mean() < 0.5


def test_a_prompt_without_a_text_ends_the_run_whatever_the_policy(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="prompt 'a cat' does not say which text"):
        score(Ocr(on_error="drop"), scorer, draw_text("HELLO")[None], ["a cat"])


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r'rewards\.ocr needs rapidocr .*pip install "rlalign\[ocr'):
        Ocr().load("cpu")


@pytest.mark.parametrize("wrong", [{"zoom": 0}, {"threads": 0}, {"line_width": 40}])
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"rewards.*{next(iter(wrong))}"):
        build("rewards", {"name": "ocr", **wrong})
