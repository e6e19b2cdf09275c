"""The second reader on drawn text, by the real program (Debian's tesseract-ocr)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.data import words
from rlalign.rewards.base import Scorer, score
from rlalign.rewards.tesseract import Tesseract
from tests.rewards.drawn_text import draw_text

HELLO = 'a sign "Hello"'


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Tesseract().load("cpu")


@pytest.mark.parametrize(
    "how",
    [{}, {"angle": 5}, {"pixels": 10, "size": (24, 64)}, {"noise": 20.0}, {"light_on_dark": True}],
    ids=["plain", "rotated", "small", "noisy", "light on dark"],
)
def test_it_reads_drawn_text(how: dict) -> None:
    picture = draw_text("HELLO", **how)
    reward = Tesseract(zoom=3.0 if how.get("pixels") else 1.0)
    scores = score(reward, reward.load("cpu"), np.stack([picture] * 2), [HELLO, '"JELLY"'])
    assert scores.tolist() == pytest.approx([1.0, 0.6])


def test_a_score_does_not_depend_on_its_batch(scorer: Scorer) -> None:
    """Among them pictures without text, which are pages too."""
    texts = ["HELLO", "", "HE", "HELLO\nYOU", "HELP", ""]
    media = np.stack([draw_text(text, pixels=20, size=(96, 192)) for text in texts])
    together = score(Tesseract(), scorer, media, [HELLO] * len(texts))
    alone = [score(Tesseract(), scorer, one[None], [HELLO])[0] for one in media]
    assert together.tolist() == alone
    assert alone == pytest.approx([1.0, 0.0, 0.4, 0.4, 0.6, 0.0])


def test_a_clip_scores_the_mean_over_its_frames(scorer: Scorer) -> None:
    clip = torch.from_numpy(np.concatenate([draw_text("HELLO"), draw_text("HELP")])[None])
    assert float(scorer(clip.float() / 255.0, [HELLO])[0]) == pytest.approx(0.8)


def test_the_words_of_the_embedded_task_are_read() -> None:
    """Forty drawn words as one line each: all of them, 0.95 is asked for."""
    rng = np.random.default_rng(0)
    drawn = [words.random_word(rng, "held_out") for _ in range(40)]
    media = np.stack([words.draw(w, rng).transpose(2, 0, 1)[None] for w in drawn])
    prompts = [words.caption(word) for word in drawn]
    reward = Tesseract(detect=False, zoom=3.0)
    live = reward.load("cpu")
    assert score(reward, live, media, prompts).mean() > 0.95
    assert score(reward, live, media, prompts[1:] + prompts[:1]).mean() < 0.5


def test_a_missing_program_or_language_says_how_to_install_it() -> None:
    with pytest.raises(UserError, match=r"rewards\.tesseract\.command .*'no-such'.*apt-get"):
        Tesseract(command="no-such").load("cpu")
    with pytest.raises(UserError, match=r"rewards\.tesseract\.language: .* has no xyz; install"):
        Tesseract(language="eng+xyz").load("cpu")


def test_a_program_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    """It knows the language, and then reads nothing."""
    program = tmp_path / "reader"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --list-langs ] && echo eng && exit\necho no >&2\nexit 3'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    live = Tesseract(command=os.fspath(program)).load("cpu")
    with pytest.raises(UserError, match=r"rewards\.tesseract: .*reader failed with 3: no"):
        live(torch.zeros(1, 1, 3, 8, 8), [HELLO])
