"""The JSON that a browser sends, read by hand, and the JSON that it gets.

Whatever does not have the form below is refused with 400 and one sentence. Sizes are bounded:
a body has at most ``MAX_BODY_BYTES``.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from rlalign.core.files import parse_strict_json
from rlalign.web.vote.desk import About, Choice, Declined, Progress, Receipt, Sheet, Waiting

MAX_BODY_BYTES = 16 * 1024
MAX_PROMPT_CHARACTERS = 500
MAX_NAME_CHARACTERS = 60
MAX_TOKEN_CHARACTERS = 200
MAX_ID_CHARACTERS = 64
MAX_PICTURES = 6
MAX_REASONS = 16
MAX_POINTS = 64
MAX_MILLISECONDS = 24 * 3600 * 1000
CHOICES = ("left", "right", "tie", "both_bad", "skip", "rank")

DEVICE = {
    "input": ("key", "mouse", "touch", "pen", "other"),
    "layout": ("row", "column", "grid"),
    "width": ("narrow", "medium", "wide"),
    "theme": ("light", "dark"),
    "zoomed": ("yes", "no"),
}
"""What a vote may say about the screen that it was given on, beside ``load_ms``: the time from the
ballot's arrival until every picture was decoded and visible."""


def read_vote(body: bytes) -> Choice:
    """A vote. Raises Declined."""
    found = _object(
        body,
        needed={"ballot", "nonce", "choice"},
        possible={"ranking", "reasons", "points", "visible_ms", "decide_ms", "device"},
    )
    choice = found["choice"]
    if choice not in CHOICES:
        raise _bad(f"choice must be one of {', '.join(CHOICES)}")
    ranking = _list(found, "ranking", MAX_PICTURES, _place)
    if len(set(ranking)) != len(ranking):
        raise _bad("ranking must name no place twice")
    if (choice == "rank") != bool(ranking):
        raise _bad('ranking goes with the choice "rank", and with no other')
    reasons = _list(found, "reasons", MAX_REASONS, lambda value: _text(value, "a reason", 40))
    return Choice(
        ballot=_text(found["ballot"], "ballot", MAX_ID_CHARACTERS),
        nonce=_text(found["nonce"], "nonce", MAX_ID_CHARACTERS),
        choice=choice,
        ranking=ranking,
        reasons=tuple(dict.fromkeys(reasons)),
        points=_list(found, "points", MAX_POINTS, _point),
        visible_ms=_milliseconds(found, "visible_ms"),
        decide_ms=_milliseconds(found, "decide_ms"),
        device=_device(found.get("device", {})),
    )


def read_join(body: bytes) -> tuple[str, str, str]:
    """(token, name, version of the text that was agreed to); "" for what is left out."""
    found = _object(body, needed=set(), possible={"token", "name", "consent"})
    token = _text(found.get("token", ""), "token", MAX_TOKEN_CHARACTERS, empty=True)
    name = _text(found.get("name", ""), "name", MAX_NAME_CHARACTERS, empty=True)
    consent = _text(found.get("consent", ""), "consent", MAX_ID_CHARACTERS, empty=True)
    return token, " ".join(name.split()), consent


def read_prompt(body: bytes) -> str:
    """A prompt in one line, "" for the next one of the list."""
    found = _object(body, needed={"text"}, possible=set())
    text = _text(found["text"], "text", MAX_PROMPT_CHARACTERS, empty=True)
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_undo(body: bytes) -> str:
    """The nonce of an undo."""
    found = _object(body, needed={"nonce"}, possible=set())
    return _text(found["nonce"], "nonce", MAX_ID_CHARACTERS)


def _object(body: bytes, *, needed: set[str], possible: set[str]) -> dict[str, Any]:
    """The JSON object of a body with these keys and no others."""
    try:
        found = parse_strict_json(body.decode("utf-8"))
    except RecursionError as error:
        raise _bad("the body is nested too deeply") from error
    except ValueError as error:
        raise _bad("the body must be JSON in UTF-8, without NaN or a key twice") from error
    if not isinstance(found, dict):
        raise _bad("the body must be a JSON object")
    if needed - set(found):
        raise _bad(f"the body must hold {', '.join(sorted(needed))}")
    if set(found) - needed - possible:
        known = ", ".join(sorted(needed | possible)) or "none"
        raise _bad(f"the body has a key that is not known; known are: {known}")
    return found


def _bad(sentence: str) -> Declined:
    return Declined(400, "malformed", sentence)


def _text(value: Any, place: str, most: int, *, empty: bool = False) -> str:
    """Text without control characters or marks that turn the direction of writing."""
    if not isinstance(value, str) or len(value) > most or not (value.strip() or empty):
        raise _bad(f"{place} must be text of at most {most} characters")
    for character in value:
        kind = unicodedata.category(character)
        if kind in ("Cs", "Cn", "Co") or (kind == "Cc" and character not in "\t\n\r"):
            raise _bad(f"{place} must be text without control characters")
        if unicodedata.bidirectional(character) in _TURNS:
            raise _bad(f"{place} must be text without marks that turn its direction")
    return value.strip()


_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def _list(found: Mapping[str, Any], key: str, most: int, read: Callable[[Any], Any]) -> tuple:
    values = found.get(key, [])
    if not isinstance(values, list) or len(values) > most:
        raise _bad(f"{key} must be a list of at most {most} entries")
    return tuple(read(value) for value in values)


def _place(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_PICTURES:
        raise _bad(f"a place must be a whole number from 0 to {MAX_PICTURES - 1}")
    return value


def _point(value: Any) -> tuple[int, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise _bad("a point must be [place, x, y]")
    return _place(value[0]), _share(value[1]), _share(value[2])


def _share(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise _bad("x and y of a point must be numbers from 0 to 1")
    return float(value)


def _milliseconds(found: Mapping[str, Any], key: str) -> int:
    value = found.get(key, 0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_MILLISECONDS or not math.isfinite(value):
        raise _bad(f"{key} must be a number from 0 to {MAX_MILLISECONDS}")
    return round(value)


def _device(value: Any) -> dict[str, str | int]:
    if not isinstance(value, dict):
        raise _bad("device must be an object")
    found: dict[str, str | int] = {}
    for key, said in value.items():
        if key == "load_ms":
            found[key] = _milliseconds(value, key)
        elif key in DEVICE and isinstance(said, str) and said in DEVICE[key]:
            found[key] = said
        else:
            raise _bad(f"device may hold {', '.join(DEVICE)} and load_ms, with their own values")
    return found


# --- what the browser gets ------------------------------------------------------------------------


def about_json(about: About) -> dict[str, Any]:
    """What the page's modules have to know of it."""
    return {
        "title": about.title,
        "mode": about.mode,
        "reasons": list(about.reasons),
        "points": about.points,
        "typing": about.typing,
        "consent": about.consent,
        "consent_version": about.consent_version,
        "names_after": about.names_after,
    }


def progress_json(progress: Progress) -> dict[str, Any]:
    """How far a person is."""
    return {
        "done": progress.done,
        "of": progress.of,
        "waiting": progress.waiting,
        "made": progress.made,
        "to_make": progress.to_make,
        "round": progress.round,
        "votes": list(progress.votes) if progress.votes is not None else None,
    }


def sheet_json(
    sheet: Sheet, allowed: tuple[str, ...], key_of: Callable[[str], str]
) -> dict[str, Any]:
    """A ballot; ``key_of`` gives the key under which this person may ask for a picture."""
    return {
        "ballot": sheet.ballot,
        "mode": sheet.mode,
        "prompt": sheet.prompt,
        "pictures": [key_of(uid) for uid in sheet.uids],
        "ahead": [key_of(uid) for uid in sheet.ahead],
        "clips": [key_of(uid) for uid in (*sheet.uids, *sheet.ahead) if uid in sheet.clips],
        "allowed": list(allowed),
        "chain": sheet.chain,
        "progress": progress_json(sheet.progress),
    }


def waiting_json(waiting: Waiting, key_of: Callable[[str], str]) -> dict[str, Any]:
    """Why there is no ballot."""
    return {
        "waiting": waiting.code,
        "words": waiting.words,
        "ahead": [key_of(uid) for uid in waiting.ahead],
        "progress": progress_json(waiting.progress),
    }


def receipt_json(receipt: Receipt, following: dict[str, Any]) -> dict[str, Any]:
    """The answer to a vote, with what comes after it."""
    return {"status": receipt.status, "names": list(receipt.names), "next": following}
