"""The embedded task of written text: which words there are, and what a picture of one shows."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError, build
from rlalign.data.words import (
    CONSONANTS,
    SIZE,
    SPLITS,
    VOWELS,
    caption,
    draw,
    misspell,
    random_word,
    split_of,
    words,
)
from rlalign.rewards._written import edit_distance, wanted_text


def test_the_splits_are_disjoint_and_every_held_out_letter_is_trained_at_its_place() -> None:
    train, held_out = (set(words(split)) for split in SPLITS)
    assert (len(train), len(held_out)) == (2966, 410)
    assert not train & held_out

    def places(of: set[str]) -> set[tuple[int, int, str]]:
        return {(len(word), at, letter) for word in of for at, letter in enumerate(word)}

    assert places(held_out) <= places(train)
    assert {len(word) for word in held_out} == {3, 4}
    assert all(split_of(word) == "train" for word in train)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="split must be one of train, held_out, got 'novel'"):
        words("novel")  # type: ignore[arg-type]


def test_a_misspelt_word_is_one_or_two_letters_off_and_pronounceable() -> None:
    rng = np.random.default_rng(0)
    off = []
    for _ in range(200):
        word = random_word(rng)
        wrong = misspell(word, rng)
        off.append(edit_distance(word, wrong))
        assert len(wrong) == len(word)
        assert all(letter in (VOWELS if at % 2 else CONSONANTS) for at, letter in enumerate(wrong))
    assert set(off) == {1, 2}


def test_a_picture_is_light_letters_and_depends_on_the_generator_alone() -> None:
    word = "MUSE"
    pictures = [draw(word, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert pictures[0].shape == (SIZE, SIZE, 3) and pictures[0].dtype == np.uint8
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    # four letters leave a margin on every side
    edge = np.concatenate([pictures[2][0], pictures[2][-1], pictures[2][:, 0], pictures[2][:, -1]])
    assert edge.max() < 60 < 150 < pictures[2].max()


def test_the_prompts_carry_the_wanted_text_and_evaluation_sees_other_words() -> None:
    source = build("prompts", {"name": "words"})
    held_out = source.held_out(500)
    assert len({text for _, text in held_out}) == 410
    assert not {text for _, text in held_out} & set(source.pool())
    for _, prompt in held_out[:20]:
        word = record_of(prompt)["text"]
        assert prompt == caption(word) and split_of(word) == "held_out"
        assert wanted_text(str(prompt), "text", "") == word
    assert len(build("prompts", {"name": "words", "limit": 7}).pool()) == 7
