"""A prompt that carries a record, such as the words that a picture shall show or the objects that
it shall hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Prompt(str):
    """A prompt's text with a record: names -> JSON values.

    It is text wherever text is asked for: policies, files and metrics see a string, and two prompts
    of the same text are equal. The record stays with it through tuples, pickles and Ray, and is
    lost where a new string is made of it (``prompt.strip()``, ``json.dumps``). A reward reads it by
    ``record_of``.
    """

    record: Mapping[str, Any]

    def __new__(cls, text: str, record: Mapping[str, Any] | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.record = record or {}
        return prompt

    def __reduce__(self) -> tuple[type[Prompt], tuple[str, dict[str, Any]]]:
        return Prompt, (str.__str__(self), dict(self.record))


def record_of(prompt: str) -> Mapping[str, Any]:
    """What a prompt carries beside its text; empty for a plain string."""
    return prompt.record if isinstance(prompt, Prompt) else _NOTHING


def dump_record(prompt: str) -> str:
    """What a prompt carries, as a JSON object; "{}" for a plain string."""
    return json.dumps(dict(record_of(prompt)), ensure_ascii=False)


def with_record(text: str, record: Any) -> str:
    """The prompt of a text and of the JSON object that ``dump_record`` wrote; the plain text where
    there is none, or where it is something else."""
    try:
        found = json.loads(record) if isinstance(record, str) else None
    except (ValueError, RecursionError):
        found = None
    return Prompt(text, found) if isinstance(found, dict) and found else text
