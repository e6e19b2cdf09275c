"""The page's HTML: one Jinja environment, texts from the language files, and no text of a person's
or a run's that is not escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlalign.web.vote.desk import About
from rlalign.web.vote.messages import MAX_NAME_CHARACTERS, MAX_PROMPT_CHARACTERS, about_json
from rlalign.web.vote.results import lay_out
from rlalign.web.vote.words import choose_language

STATIC = Path(__file__).parent / "static"
TEMPLATES = Path(__file__).parent / "templates"
THEMES = ("light", "dark")

REASON_KEYS = {
    "prompt": "f",
    "looks": "l",
    "shape": "h",
    "text": "t",
    "safety": "d",
}
"""Reasons that the language files have words for -> their letters; others get the free letters."""

FREE_KEYS = "bcegijkoqrvwxyap"
"""Letters that no other key of the page has."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How somebody wants a page."""

    language: str = ""
    """The code of the language that was chosen, "" for none."""
    accepted: str = ""
    """The languages that the browser asks for (Accept-Language)."""
    theme: str = ""


@dataclass(kw_only=True)
class Templates:
    """The pages, in each of the languages."""

    languages: Mapping[str, Mapping[str, str]]
    _environment: Environment = field(init=False)
    _version: str = field(init=False)

    def __post_init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # a browser that has yesterday's files asks for today's
        content = b"".join(file.read_bytes() for file in sorted(STATIC.iterdir()))
        self._version = blake2b(content, digest_size=6).hexdigest()

    def index(self, about: About, reader: Reader, *, with_token: bool) -> str:
        """The page where people vote."""
        frame = self._frame(reader)
        words = frame["words"]
        keys = reason_keys(about.reasons)
        reasons = [
            {"name": name, "key": keys[name], "label": words.get(f"reason_{name}", name)}
            for name in about.reasons
        ]
        asked = {key: text for key, text in words.items() if not key.startswith("results")}
        data = {**about_json(about), "with_token": with_token, "words": asked}
        limits = {"name": MAX_NAME_CHARACTERS, "prompt": MAX_PROMPT_CHARACTERS}
        return self._render(
            "index", **frame, about=about, reasons=reasons, data=data, limits=limits
        )

    def results(
        self, about: About, found: Mapping[str, Any], reader: Reader, key_of: Callable[[str], str]
    ) -> str:
        """The page of the numbers; ``key_of`` gives keys of pictures for the administrator."""
        frame = self._frame(reader)
        page = lay_out(found, frame["words"], key_of)
        return self._render("results", **frame, about=about, page=page)

    def admin(self, reader: Reader) -> str:
        """The question for the administrator's token."""
        return self._render("admin", **self._frame(reader))

    def _frame(self, reader: Reader) -> dict[str, Any]:
        language = choose_language(reader.language, reader.accepted, list(self.languages))
        return {
            "language": language,
            "languages": {code: texts["language"] for code, texts in self.languages.items()},
            "words": self.languages[language],
            "theme": reader.theme if reader.theme in THEMES else "",
            "version": self._version,
        }

    def _render(self, name: str, **values: Any) -> str:
        return self._environment.get_template(f"{name}.html.j2").render(**values)


def reason_keys(reasons: Sequence[str]) -> dict[str, str]:
    """Reason -> the letter that gives it."""
    keys = {name: REASON_KEYS[name] for name in reasons if name in REASON_KEYS}
    others = [name for name in reasons if name not in keys]
    return keys | dict(zip(others, FREE_KEYS, strict=False))
