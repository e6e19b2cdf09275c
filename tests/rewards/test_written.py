"""What the rewards of written text share: the rule, and where the wanted text comes from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError
from rlalign.rewards._written import edit_distance, plain_text, share_read, wanted_text


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("HELLO", "HELLO", 1.0),
        ("hel lo\n", "H E L L O", 1.0),
        ("HELO", "HELLO", 0.8),
        ("HALLO", "HELLO", 0.8),
        ("HHELLO", "HELLO", 0.8),
        ("OLLEH", "HELLO", 0.2),
        ("", "HELLO", 0.0),
        # not below 0, however much is read
        ("a far longer text", "CAT", 0.0),
        ("cafe\u0301", "CAFÉ", 1.0),
        ("STRASSE", "Straße", 1.0),
    ],
)
def test_the_share_by_hand(read: str, wanted: str, score: float) -> None:
    assert share_read(read, wanted) == pytest.approx(score)


def test_a_longer_text_may_count_as_all_of_it() -> None:
    assert share_read("the CATS", "cat") == 0.0
    assert share_read("the CATS", "cat", contains=True) == 1.0
    assert share_read("the C TS", "cat", contains=True) == share_read("the C TS", "cat")


@given(*[st.text("abc", max_size=6)] * 3)
def test_the_distance_is_a_metric_of_texts(first: str, second: str, third: str) -> None:
    distance = edit_distance(first, second)
    assert (distance == 0) == (first == second)
    assert distance == edit_distance(second, first)
    assert distance <= edit_distance(first, third) + edit_distance(third, second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


@given(st.text("abcd", max_size=8), st.integers(0, 8), st.sampled_from("abcd"))
def test_an_insertion_is_one_edit(text: str, place: int, letter: str) -> None:
    assert edit_distance(text, text[:place] + letter + text[place:]) == 1


@given(st.text(max_size=8), st.text(min_size=1, max_size=8).filter(plain_text))
def test_the_score_is_from_0_to_1(read: str, wanted: str) -> None:
    assert 0.0 <= share_read(read, wanted) <= 1.0
    assert share_read(wanted, wanted) == 1.0


def test_the_record_is_asked_before_the_quotes() -> None:
    sign = Prompt('a sign "OPEN"', {"text": "CLOSED", "other": "SHUT"})
    assert wanted_text(sign, "text", "rewards.ocr") == "CLOSED"
    assert wanted_text(sign, "other", "rewards.ocr") == "SHUT"
    assert wanted_text(sign, "absent", "rewards.ocr") == "OPEN"
    assert wanted_text('"ONE" and "TWO"', "text", "rewards.ocr") == "ONE"
    assert wanted_text("a sign “OPEN”", "text", "rewards.ocr") == "OPEN"


@pytest.mark.parametrize("prompt", ["a sign", 'a sign ""', 'a sign " "', 'an open " quote'])
def test_a_prompt_without_a_wanted_text_is_named(prompt: str) -> None:
    with pytest.raises(UserError) as told:
        wanted_text(prompt, "text", "rewards.ocr")
    assert repr(prompt) in str(told.value) and "rewards.ocr" in str(told.value)
    assert "double quotes" in str(told.value) and "'text'" in str(told.value)


@pytest.mark.parametrize("wrong", ["", "  ", 7, ["CAT"]])
def test_a_record_that_holds_no_text_is_named(wrong: object) -> None:
    with pytest.raises(UserError, match=r"rewards\.ocr\.field: the record of prompt 'a sign'"):
        wanted_text(Prompt("a sign", {"text": wrong}), "text", "rewards.ocr")
