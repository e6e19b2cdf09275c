"""Recipes and the shelves of plug-ins: the name in the YAML is the file's name.

A *recipe* is a frozen pydantic model: its fields are the settings, its methods are the behaviour,
and it pickles. A *shelf* is a package with a ``base.py`` that names the shelf's base class; every
other file on it is one plug-in, except helpers of the shelf's own, whose names begin with an
underscore. A plug-in kept elsewhere is named ``package.module:Class``.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

SHELVES: dict[str, str] = {
    "algorithms": "Algorithm",
    "limits": "Limit",
    "optimizers": "Optimizer",
    "policies": "PolicyRecipe",
    "prompts": "Prompts",
    "rewards": "Reward",
    "samplers": "Sampler",
    "sinks": "Sink",
}
"""Shelf -> name of the base class in its ``base.py``. The shelf of prompts lives in
``rlalign/data/``, those of a guard's limits and of optimisers in ``rlalign/learning/``."""

_PACKAGES = {
    "limits": "learning.limits",
    "optimizers": "learning.optimizers",
    "prompts": "data.prompts",
}


class UserError(ValueError):
    """A user's mistake: one message with place, rule, value and the way out. The command line ends
    with code 2 on it."""


def read_reason(error: BaseException, line: int = 0) -> str:
    """What an exception says, in one line of its own (the first; -1 is the last): its class where
    it says nothing."""
    said = str(error).strip().splitlines()
    return said[line] if said else type(error).__name__


@dataclass(frozen=True)
class Before:
    """Marks a setting that came later: its value of before says what runs did when there was no
    such setting."""

    value: Any


class Recipe(BaseModel):
    """Base of every plug-in: settings as fields, behaviour as methods; frozen, picklable, unknown
    keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    shelf: ClassVar[str] = ""

    name: str = Field(default="", description="the plug-in's file name, or package.module:Class")

    @model_validator(mode="before")
    @classmethod
    def _own_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("name"):
            return {**data, "name": plugin_name(cls)}
        return data


def plugin_name(cls: type) -> str:
    """The name under which YAML finds a class: the file's name on a shelf, ``module:Class``
    elsewhere."""
    if any(cls.__module__.startswith(_package(shelf) + ".") for shelf in SHELVES):
        return cls.__module__.rsplit(".", 1)[-1]
    return f"{cls.__module__}:{cls.__qualname__}"


def _package(shelf: str) -> str:
    return f"rlalign.{_PACKAGES.get(shelf, shelf)}"


def _folder(shelf: str) -> Path:
    return Path(__file__).parents[1].joinpath(*_PACKAGES.get(shelf, shelf).split("."))


def names(shelf: str) -> list[str]:
    """The plug-ins of a shelf, by reading the folder (nothing is imported)."""
    stems = [p.stem for p in _folder(shelf).glob("*.py")]
    return sorted(s for s in stems if s != "base" and not s.startswith("_"))


def nearest(word: str, known: list[str]) -> str:
    """A "did you mean" for an error message, or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def load_class(shelf: str, name: str) -> type[Recipe]:
    """The recipe class that ``name`` means on ``shelf``.

    Raises UserError when there is no such plug-in, or when it does not derive from the shelf's base
    class.
    """
    # kept elsewhere: what is named there must be a class of the shelf
    base = getattr(importlib.import_module(f"{_package(shelf)}.base"), SHELVES[shelf])
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise UserError(
                f"{shelf}: a plug-in kept elsewhere is named package.module:Class, got {name!r}"
            )
        try:
            found = importlib.import_module(module_name).__dict__[class_name]
        except ModuleNotFoundError as error:
            raise UserError(
                f"{shelf}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?"
            ) from error
        except KeyError as error:
            raise UserError(
                f"{shelf}: module {module_name!r} has no class {class_name!r}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UserError(
                f"{shelf}: {name!r} must be a class derived from"
                f" {_package(shelf)}.base.{base.__qualname__}"
            )
        return found
    # on the shelf: a file with one public class
    if name not in names(shelf):
        raise UserError(f"no plug-in {name!r} on shelf {shelf}; {nearest(name, names(shelf))}")
    module = importlib.import_module(f"{_package(shelf)}.{name}")
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, base) and c.__module__ == module.__name__
    ]
    public = [c for c in own if not c.__name__.startswith("_")]
    assert len(public) == 1, (
        f"{module.__name__} must define exactly one public {base.__name__}, has {public}"
    )
    return public[0]


def find(call: str, place: str) -> Callable[..., Any]:
    """The callable that ``package.module:function`` means. Raises UserError naming ``place``."""
    module_name, _, attribute = call.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{place}: cannot import {module_name!r} ({error}); is its folder on PYTHONPATH?"
        ) from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise UserError(
            f"{place}: {module_name!r} has no {attribute!r}; write package.module:function"
        ) from error
    if not callable(found):
        raise UserError(
            f"{place} must name something that can be called, got {call!r}, a"
            f" {type(found).__name__}"
        )
    return found


def build(shelf: str, settings: Mapping[str, Any] | Recipe, path: str = "") -> Recipe:
    """A recipe from its YAML mapping. Raises UserError with the path, the rule, the value and the
    nearest valid name."""
    if isinstance(settings, Recipe):
        return settings
    path = path or shelf
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise UserError(
            f"{path} must be a mapping with a name, got {settings!r}; {nearest('', names(shelf))}"
        )
    try:
        cls = load_class(shelf, settings["name"])
    except UserError as error:
        raise UserError(f"{path}.name: {error}") from error
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(explain(error, cls, path)) from error


def plugin_field(shelf: str, place: str = "") -> BeforeValidator:
    """Marks a field that holds a plug-in, which is built by its name. Its errors carry their own
    path and pass through."""
    return BeforeValidator(lambda value: build(shelf, value, place or shelf))


def explain(error: ValidationError, cls: type[BaseModel], path: str) -> str:
    """Pydantic's first complaint as one line: place, rule, value, and the nearest valid name for an
    unknown key."""
    found = error.errors(include_url=False)
    first = found[0]
    loc = first["loc"]
    got = f", got {_shown(first['input'])}"
    if loc and str(loc[-1]).startswith("literal["):
        # of a setting that takes words or a number, pydantic adds to the place which of the two it
        # tried
        loc = loc[:-1]
        kinds = [_KINDS.get(e["type"], "") for e in found[1:] if e["loc"][:-1] == loc]
        choice = " or ".join([first["msg"].removeprefix("Input should be "), *kinds])
        return f"{_place(path, loc)} must be {choice.removesuffix(' or ')}{got}"

    # kinds of complaint whose words are ours
    place = _place(path, loc)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown setting; {nearest(str(loc[-1]), _fields_at(cls, loc[:-1]))}"
    if first["type"] == "missing":
        return f"{place} is required"
    if first["type"] in _RULES:
        return f"{place} must {_RULES[first['type']].format(**first.get('ctx', {}))}{got}"

    # pydantic's own words, or those of a validator of ours
    rule = first["msg"].removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        rule = rule.replace(theirs, ours)
    if rule.startswith("must"):
        return f"{place} {rule}{got}"
    if rule.partition(" ")[0] in _fields_at(cls, loc):
        # a rule between settings names the one that is wrong
        return f"{place}.{rule}".removeprefix(".")
    return f"{place}: {rule}" if place else rule


_WORDS = {
    "Input should": "must",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
}
"""Pydantic's words -> ours, in this order."""

_RULES = {
    "too_short": "hold at least {min_length}",
    "too_long": "hold at most {max_length}",
    "tuple_type": "be a list",
    "dict_type": "be a mapping",
    "model_type": "be a mapping of settings",
    "string_pattern_mismatch": "match {pattern}",
    "invalid_key": "be a name",
}
"""Pydantic's kind of complaint -> the rule, where its own words are not for readers of YAML."""

_KINDS = {"float_parsing": "a number", "float_type": "a number", "finite_number": "a finite number"}


def _place(path: str, loc: tuple[int | str, ...]) -> str:
    return ".".join([path, *(str(part) for part in loc)]).strip(".")


def _shown(value: Any) -> str:
    """A value in an error message, not at any length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = cls.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return []
        cls = field.annotation
    return sorted(cls.model_fields)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``rlalign list`` prints of one plug-in, read from its source without importing it."""

    name: str
    summary: str
    source: str
    weights: str
    """Where the published weights come from; empty where there are none to fetch."""
    settings: dict[str, str]


def describe(shelf: str) -> list[Description]:
    """Every plug-in of a shelf with its first docstring line, its ``Source:``, its ``Weights:`` and
    its settings (read with ``ast``)."""
    folder = _folder(shelf)
    trees = {
        file.stem: ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*.py"))
    }
    classes = {c.name: c for t in trees.values() for c in t.body if isinstance(c, ast.ClassDef)}
    return [_describe(name, trees[name], classes, SHELVES[shelf]) for name in names(shelf)]


def _describe(
    name: str, tree: ast.Module, classes: Mapping[str, ast.ClassDef], base: str
) -> Description:
    """What is read of a file; ``classes`` are all of its shelf, ``base`` names the one that
    plug-ins derive from."""
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    lines = {c.name: _line(c.name, classes) for c in public}
    derived = [c for c in public if base in lines[c.name]]
    chosen = [*derived, *public][0]
    doc = ast.get_docstring(chosen) or ast.get_docstring(tree) or ""
    paragraphs = [" ".join(lines.split()) for lines in doc.split("\n\n")]

    # a class's own settings come after those that it inherits
    settings: dict[str, str] = {}
    for one in reversed(lines[chosen.name]):
        if one != base and one in classes:
            settings |= _settings(classes[one])
    return Description(
        name=name,
        summary=paragraphs[0],
        source=_said_after("Source:", paragraphs),
        weights=_said_after("Weights:", paragraphs),
        settings=settings,
    )


def _said_after(word: str, paragraphs: Iterable[str]) -> str:
    """What follows a word in the first paragraph that has it; empty where none has."""
    return next((one.split(word, 1)[1].strip() for one in paragraphs if word in one), "")


def _line(name: str, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    """The names of a class and of those that it derives from, nearest first, as far as the shelf
    has them."""
    line = [name]
    for base in classes[name].bases if name in classes else ():
        parent = ast.unparse(base).rpartition(".")[2]
        if parent != name:
            line += _line(parent, classes)
    return line


def shared_settings(shelf: str) -> dict[str, str]:
    """Setting -> default of what every plug-in of a shelf takes beside its own, read from its base
    class with ``ast``."""
    for file in sorted(_folder(shelf).glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == SHELVES[shelf]:
                return _settings(node)
    return {}


def _settings(cls: ast.ClassDef) -> dict[str, str]:
    settings: dict[str, str] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation) or node.target.id.startswith("_"):
                continue
            settings[node.target.id] = _default(node.value)
    return settings


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call):
        made = next((k.value for k in value.keywords if k.arg == "default_factory"), None)
        if made is not None:
            return f"{ast.unparse(made)}()"
        given = [k.value for k in value.keywords if k.arg == "default"] + value.args[:1]
        return ast.unparse(given[0]) if given and ast.unparse(given[0]) != "..." else "required"
    return ast.unparse(value)
