"""A prompt with a record is text that keeps its record."""

from __future__ import annotations

import pickle

from rlalign.core.prompts import Prompt, record_of


def test_a_prompt_is_its_text_and_keeps_its_record_in_a_pickle():
    prompt = Prompt('a sign that says "OPEN"', {"text": "OPEN", "tags": ["ocr"]})
    assert prompt == 'a sign that says "OPEN"'
    assert {str(prompt): 1}[prompt] == 1

    again = pickle.loads(pickle.dumps((prompt, "plain")))
    assert again == (prompt, "plain")
    assert record_of(again[0]) == {"text": "OPEN", "tags": ["ocr"]}
    assert type(str(again[0])) is str


def test_plain_text_has_an_empty_record():
    assert record_of("a red circle") == {}
    assert record_of(Prompt("a red circle")) == {}
