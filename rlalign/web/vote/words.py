"""The page's languages, and the words that a prompt may not hold. Both are files.

A language is ``languages/CODE.json``: one object of texts with the same keys as ``en.json``. A text
may hold {places} that the page fills in. Another folder may be named, whose files come on top.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlalign.core.files import UnreadableText, parse_strict_json, read_text, split_lines
from rlalign.core.registry import UserError

LANGUAGES = Path(__file__).parent / "languages"
BLOCKED = Path(__file__).parent / "blocked.txt"
FALLBACK = "en"


def read_languages(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """Code of a language -> its texts. Raises UserError for a file that is not as it should be."""
    files = sorted(LANGUAGES.glob("*.json")) + sorted(folder.glob("*.json") if folder else [])
    own = json.loads((LANGUAGES / f"{FALLBACK}.json").read_text(encoding="utf-8"))
    return {file.stem: _read_language(file, own) for file in files}


def _read_language(file: Path, own: Mapping[str, str]) -> dict[str, str]:
    try:
        texts = parse_strict_json(read_text(file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: a language must be a JSON object of texts, got {error}"
        ) from error
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{file}: a language must be a JSON object whose values are texts")

    # every text is there, with the same places to fill in
    missing = sorted(set(own) - set(texts))
    unknown = sorted(set(texts) - set(own))
    if missing or unknown:
        lists = (
            f"missing: {', '.join(missing) or 'none'}; not known: {', '.join(unknown) or 'none'}"
        )
        raise UserError(f"{file}: a language must have the keys of {FALLBACK}.json ({lists})")
    for key, text in texts.items():
        if _places(text) != _places(own[key]):
            raise UserError(
                f"{file}: {key} must hold the places {sorted(_places(own[key]))}, got"
                f" {sorted(_places(text))}"
            )
    return texts


def _places(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def choose_language(wanted: str, accepted: str, known: Sequence[str]) -> str:
    """The language that a person has chosen, else the first one that the browser asks for
    (Accept-Language), else English."""
    if wanted in known:
        return wanted
    asked: list[tuple[float, int, str]] = []
    for place, part in enumerate(accepted[:500].split(",")):
        name, _, quality = part.partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        asked.append((-weight, place, name.strip().lower()))
    for _, _, name in sorted(asked):
        for code in known:
            if name == code.lower() or name.split("-")[0] == code.lower():
                return code
    return FALLBACK


# --- words that are not taken ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Blocked:
    """Words that a prompt may not hold, whole words without regard to case, width or accents; where
    a script does not part its words, anywhere."""

    words: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()

    def holds(self, prompt: str) -> bool:
        """Whether a prompt has one of them."""
        plain = _plain(prompt)
        padded = " " + " ".join(re.findall(r"\w+", plain)) + " "
        return any(f" {word} " in padded for word in self.words) or any(
            part in plain for part in self.parts
        )


def read_blocked(file: Path = BLOCKED) -> Blocked:
    """The words of a file, one a line; what follows a # is a comment. Raises UserError where it
    cannot be read."""
    try:
        lines = split_lines(read_text(file))
    except (OSError, UnreadableText) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: the list of words must be a text file ({reason})") from error
    words = [_plain(line.partition("#")[0]).strip() for line in lines]
    words = [" ".join(re.findall(r"\w+", word)) for word in words if word]
    apart = [word for word in words if not _is_joined(word)]
    return Blocked(words=frozenset(apart), parts=tuple(w for w in words if _is_joined(w)))


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).casefold()
    # accents go, the marks of kana stay: they make other words
    bare = "".join(
        c for c in folded if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) != "Cf"
    )
    return unicodedata.normalize("NFC", bare)


def _is_joined(word: str) -> bool:
    """Whether a word's script writes without spaces (kana, Han)."""
    return any("\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" for c in word)
