"""What a judge answers: a chat completion in the OpenAI protocol, and the score that it means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlalign.rewards._judge_questions import Asked

_BARE_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


class Unreadable(Exception):
    """An answer that means no score: what is wrong with it, as the rest of a sentence."""


class Reply(NamedTuple):
    """The part of an answer that a score is read from."""

    text: str
    chances: tuple[tuple[str, float], ...] | None
    """(token, log probability) of the likeliest first words; None where the server gives none."""
    tokens: int = 0
    """What the server counts for question and answer."""

    def kept(self) -> str:
        """As JSON, for the cache."""
        return json.dumps({"text": self.text, "chances": self.chances})

    @classmethod
    def of_kept(cls, kept: str) -> Reply:
        found = json.loads(kept)
        chances = found["chances"]
        return cls(found["text"], None if chances is None else tuple((t, c) for t, c in chances))


def read_reply(body: bytes) -> Reply:
    """A chat completion. Raises ValueError with the rule that the body breaks."""
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("the answer must be JSON") from error
    choices = found.get("choices") if isinstance(found, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(message, dict):
        raise ValueError("the answer must hold choices[0].message")
    text = message.get("content")
    usage = found.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else 0
    return Reply(
        text if isinstance(text, str) else "",
        _chances(first.get("logprobs")),
        tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else 0,
    )


def _chances(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """Of the first token that is not blank: a model may begin with a line break."""
    places = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(places, list):
        return None
    for place in places:
        if not isinstance(place, dict) or not isinstance(place.get("token"), str):
            return None
        if not place["token"].strip():
            continue
        top = place.get("top_logprobs")
        if not isinstance(top, list) or not all(map(_is_chance, top)):
            return None
        return tuple((one["token"], float(one["logprob"])) for one in top)
    return ()


def _is_chance(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("token"), str)
        and isinstance(one.get("logprob"), int | float)
        and not isinstance(one["logprob"], bool)
    )


def number_of(text: str, pattern: re.Pattern[str], scale: tuple[float, float]) -> float:
    """The number after the last match of ``pattern``, or the only thing in the answer, on the scale
    as 0 to 1. Raises Unreadable where there is none, or one off the scale."""
    found = pattern.findall(text)
    bare = _BARE_NUMBER.fullmatch(text.strip())
    said = found[-1] if found else bare.group() if bare else ""
    lowest, highest = scale
    try:
        number = float(said)
    except ValueError as error:
        raise Unreadable(f"gives no mark that pattern finds: {shorten(text)}") from error
    if not lowest <= number <= highest:
        raise Unreadable(f"is {number:g}, off the scale of {lowest:g} to {highest:g}")
    return (number - lowest) / (highest - lowest)


def chance_of(reply: Reply, asked: Asked) -> float:
    """The probability of the wanted words, 0 to 1; against others where the question has such.

    Summed over tokens that are one of the words but for case and blanks. Raises Unreadable where
    neither these words nor those against them are among the likeliest.
    """
    assert reply.chances is not None

    def summed(words: frozenset[str]) -> float:
        return sum(math.exp(c) for token, c in reply.chances or () if _word(token) in words)

    wanted = summed(asked.wanted)
    if not asked.against:
        return min(wanted, 1.0)
    total = wanted + summed(asked.against)
    if total <= 0:
        words = " nor ".join(sorted(asked.wanted | asked.against, reverse=True))
        raise Unreadable(f"begins with neither {words}: {shorten(reply.text)}")
    return wanted / total


def _word(token: str) -> str:
    return token.strip().strip(".,!\"'").lower()


def mean_of(chances: Sequence[float], kind: str) -> float:
    """The arithmetic or geometric mean."""
    if kind == "arithmetic":
        return sum(chances) / len(chances)
    return math.prod(chances) ** (1.0 / len(chances))


def shorten(text: str) -> str:
    """Some of an answer, in one line that can be printed."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return repr(line[:80]) + ("..." if len(line) > 80 else "")


def error_in(body: bytes) -> tuple[str, str]:
    """(what a refusal says, its code), each "" where there is none: ``{"error": {"message": ...}}``
    of hosted servers, or what vLLM and SGLang write at the top."""
    try:
        found = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return "", ""
    said = found.get("error", found) if isinstance(found, dict) else None
    if isinstance(said, str):
        return said, ""
    if not isinstance(said, dict):
        return "", ""
    message = said.get("message") or said.get("detail") or ""
    return (message if isinstance(message, str) else str(message)), str(said.get("code") or "")
