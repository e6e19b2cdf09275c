"""Run files: YAML in and out, overrides by dotted path. Every mistake is a UserError."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rlalign.config.settings import INSIDE, LISTS, PLUGINS, Run
from rlalign.config.spelling import name_optimizer, nest_path, note_spelling, respell
from rlalign.core.files import UnreadableText, join_surrogates, parse_strict_json, read_text
from rlalign.core.locations import locate
from rlalign.core.registry import UserError, build, explain, read_reason

Settings = TypeVar("Settings", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    r"""YAML in which a key that appears twice is an error, not the last one's victory.

    Its escapes mean what JSON's do: the pair \ud83d\ude00 is one character, as JSON writes
    those outside the basic plane.
    """

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            return join_surrogates(value) if isinstance(value, str) else value
        except UnreadableText as error:
            raise UserError(f"line {node.start_mark.line + 1}: {error}") from error


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # refused below: a list or a mapping is no key
        if key_node.value in seen:
            raise UserError(
                f"line {key_node.start_mark.line + 1}: the key {key_node.value!r} appears twice;"
                " keep one"
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


# YAML 1.1 reads 1e-4 as a word; people mean a number
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing, unreadable, empty or malformed
    one."""
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file{_near_file(path)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnreadableText as error:
        raise UserError(f"{path}: must be UTF-8 text; {error}") from error
    data = parse_yaml(text, str(path))
    if data is None:
        raise UserError(f"{path}: must hold a mapping of settings, and is empty")
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a mapping of settings, got a {type(data).__name__}")
    return data


def parse_yaml(text: str, place: str) -> Any:
    """Parsed YAML, or JSON; a syntax error is a UserError with its line."""
    try:
        return _parse_json(text)
    except (ValueError, RecursionError):
        # no JSON, or JSON with a mistake that the YAML parser names with its line
        pass
    # YAML, and every way in which a text may be none
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: TID251 - a SafeLoader
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{place}:{line} not YAML: {error.problem}") from error
    except (
        KeyError,
        AttributeError,
    ) as error:
        # what PyYAML itself falls over: `!!bool z`, `!!timestamp z`
        raise UserError(f"{place}: not YAML: a value does not fit its !! tag") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:
        # ValueError: a date like 2026-99-99
        raise UserError(f"{place}: not YAML: {read_reason(error)}") from error


def _parse_json(text: str) -> Any:
    """A JSON list or object. Most of JSON is YAML, but not its tabs, long keys, and line separators
    within strings.

    Raises ValueError for what is none, for NaN and Infinity, for a key that appears twice, and for
    half a surrogate pair.
    """
    if not text.lstrip().startswith(("{", "[")):
        raise ValueError("no list and no object")
    found = parse_strict_json(text)
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, found, n=1, cutoff=0.4)
    return f"; did you mean {str(folder / close[0])!r}?" if close else ""


def override(data: dict[str, Any], assignment: str) -> None:
    """Sets ``a.b=value`` in place; the value is YAML, a number in the path is a list's index."""
    given, equals, text = assignment.partition("=")
    path = nest_path(given.strip())
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"an override must read key=value, got {assignment!r}")
    place: Any = data
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            place = place[_index(place, part, assignment)]
    value = parse_yaml(text, f"override {assignment!r}")
    if path != given.strip():
        note_spelling("the command line", (given.strip(),))
    if isinstance(place, dict):
        place[last] = name_optimizer(path, value, place.get(last))
    else:
        place[_index(place, last, assignment)] = value


def _index(place: Any, part: str, assignment: str) -> int:
    if not isinstance(place, list):
        raise UserError(f"override {assignment!r}: there is no {part!r} inside {place!r}")
    if not place:
        raise UserError(
            f"override {assignment!r}: the list is empty and has no {part!r}; give the whole list"
        )
    if not (part.isascii() and part.isdigit() and int(part) < len(place)):
        raise UserError(
            f"override {assignment!r}: {part!r} must be an index from 0 to {len(place) - 1} here"
        )
    return int(part)


def load_settings(cls: type[Settings], path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Any settings model from a YAML file with overrides applied, such as
    ``rlalign.fitting.denoiser.Pretrain``."""
    return parse(cls, _read(path, overrides))


def load_mapping(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with overrides applied."""
    return _read(path, overrides)


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """The Run of a YAML file with overrides applied."""
    return parse_run(_read(path, overrides))


def _read(path: Path | str, overrides: Sequence[str]) -> dict[str, Any]:
    data = respell(read_yaml(Path(path)), str(path))
    for assignment in overrides:
        override(data, assignment)
        data = respell(data, "the command line")
    return data


def parse_run(data: Mapping[str, Any]) -> Run:
    """The Run of a mapping. Plug-ins are built first, so that their errors say where in the file
    they are."""
    made = parse_plugins(respell(data), PLUGINS, ("rewards",))
    for path, shelf in INSIDE.items():
        group, _, key = path.rpartition(".")
        place = made.get(group)
        if isinstance(place, Mapping) and key in place:
            made = made | {group: {**place, key: build(shelf, place[key], path)}}
    for path, (shelf, example) in LISTS.items():
        group, _, key = path.rpartition(".")
        place = made.get(group) if group else made
        if isinstance(place, Mapping) and key in place:
            built = {**place, key: _plugins(shelf, place[key], path, example)}
            made = made | {group: built} if group else built
    return parse(Run, made)


def parse_plugins(
    data: Mapping[str, Any], plugins: Mapping[str, str], rewards: Sequence[str]
) -> dict[str, Any]:
    """The mapping with its plug-ins built: fields of ``plugins`` from their shelves, and lists of
    rewards."""
    made = dict(data)
    for field, shelf in plugins.items():
        if field in made:
            made[field] = build(shelf, made[field], field)
    built = {
        field: _plugins("rewards", made[field], field, "[{name: shapes}]")
        for field in rewards
        if field in made
    }
    return made | built


def _plugins(shelf: str, value: Any, path: str, example: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{path} must be a list of {shelf} such as {example}, got {value!r}")
    return [build(shelf, one, f"{path}.{i}") for i, one in enumerate(value)]


def parse(cls: type[Settings], data: Mapping[Any, Any]) -> Settings:
    """Settings of a class from a mapping. Raises UserError with the place, the rule, the value, and
    the nearest valid name."""
    odd = next((k for k in data if not isinstance(k, str)), None)
    if odd is not None:
        raise UserError(f"settings must have names, got {odd!r}")
    try:
        return cls.model_validate(respell(data))
    except ValidationError as error:
        raise UserError(explain(error, cls, "")) from error


def locate_run(run: Run, *, begun: bool, here: bool = True) -> Run:
    """The run with absolute paths, so that it means the same in every folder; ``locate`` says what
    is refused.

    Of a run that has ``begun``, config.yaml keeps the paths that it has, and with them the identity
    that its checkpoints name.
    """
    try:
        located = locate(run, here=here)
    except UserError as error:
        if not begun:
            raise
        raise UserError(
            f"{error}; a run with relative paths goes on from the folder in which it was started"
        ) from error
    if begun and located is not run:
        before = resolved(run)
        after = resolved(located)
        located._as_written = {key: value for key, value in before.items() if after[key] != value}
    return located


def resolved(run: Run) -> dict[str, Any]:
    """The run as plain data, every default written out."""
    return json.loads(run.model_dump_json()) | run._as_written


def dump(run: Run) -> str:
    """The run as YAML, every default written out; ``load_run`` of it gives the same run."""
    return yaml.safe_dump(resolved(run), sort_keys=False, allow_unicode=True)
