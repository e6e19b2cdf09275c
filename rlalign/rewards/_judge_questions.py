"""What a judge is asked: templates, and the questions that they make of a prompt.

A template is a Jinja file. It sees ``prompt`` (the text), ``record`` (what the prompt carries),
``lowest`` and ``highest`` (the scale), and ``question`` where the record lists questions. It runs
in Jinja's sandbox and reads no other file, so a template from elsewhere can do nothing but make
text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.core.registry import UserError, nearest, read_reason

SHIPPED = Path(__file__).parent / "questions"
DEFAULTS = {"number": "fit_and_quality", "yes": "shows", "listed": "one_word"}
"""Kind of answer -> the template that asks for it."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Asked(NamedTuple):
    """A question as it is sent, and what its answer is held against."""

    text: str
    wanted: frozenset[str] = frozenset()
    """Words, in lower case, whose probability counts; empty where a number is read."""
    against: frozenset[str] = frozenset()
    """Words that it is weighed against; empty where the probability counts as it is."""


class Questions:
    """Makes the questions about a picture of its prompt. ``kind`` is number, yes or listed."""

    def __init__(self, template: str, kind: str, field: str, place: str) -> None:
        """``field`` of the record lists questions with their answers. Raises UserError at ``place``
        for a template that is missing or wrong."""
        self._kind = kind
        self._field = field
        self._place = place
        self._file = _file(template or DEFAULTS[kind], place)
        self._template = _read(self._file, place)

    def of(self, prompt: str, record: Mapping[str, Any], scale: tuple[float, float]) -> list[Asked]:
        """The questions about a picture of this prompt. Raises UserError naming the prompt where
        its record does not have what is needed."""
        values = {"prompt": str(prompt), "record": dict(record)}
        values |= {"lowest": f"{scale[0]:g}", "highest": f"{scale[1]:g}"}
        if self._kind == "listed":
            return [
                Asked(self._text(prompt, {**values, "question": question}), _variants(answer))
                for question, answer in self._listed(prompt, record)
            ]
        text = self._text(prompt, values)
        if self._kind == "number":
            return [Asked(text)]
        return [Asked(text, frozenset({"yes"}), frozenset({"no"}))]

    def _text(self, prompt: str, values: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(values).strip()
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(
                f"{self._place}: the prompt {str(prompt)!r} does not fit {self._file.name}:"
                f" {read_reason(error)}"
            ) from error

    def _listed(self, prompt: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        listed = record.get(self._field)
        if not isinstance(listed, list | tuple) or not listed or not all(map(_is_pair, listed)):
            got = "nothing" if self._field not in record else repr(listed)[:100]
            raise UserError(
                f"{self._place}: the prompt {str(prompt)!r} must have {self._field} in its record,"
                f" a list of [question, answer], got {got}"
            )
        return [(question, answer) for question, answer in listed]


def _is_pair(one: Any) -> bool:
    return (
        isinstance(one, list | tuple)
        and len(one) == 2
        and all(isinstance(part, str) and part.strip() for part in one)
    )


def _variants(answer: str) -> frozenset[str]:
    """An answer in lower case; a number word also as digits."""
    word = answer.strip().lower()
    return frozenset({word, str(_NUMBERS.index(word))} if word in _NUMBERS else {word})


def _file(template: str, place: str) -> Path:
    """A template that ships with rlalign, by its name, or a file."""
    shipped = sorted(file.stem for file in SHIPPED.glob("*.txt"))
    if template in shipped:
        return SHIPPED / f"{template}.txt"
    if not Path(template).is_file():
        raise UserError(
            f"{place}.template must be a file or one of {', '.join(shipped)}, got {template!r};"
            f" {nearest(template, shipped)}"
        )
    return Path(template)


def _read(file: Path, place: str) -> Any:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    try:
        return sandbox.from_string(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}.template: cannot read {file} ({read_reason(error)})") from error
    except TemplateSyntaxError as error:
        raise UserError(f"{place}.template: {file}:{error.lineno}: {error.message}") from error
