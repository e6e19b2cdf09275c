"""Settings that name files: which ones do, and what their values mean wherever the work is done.

A relative path means what it means to the command that was typed. Work may be done in other folders
and on other machines, so a command makes such paths absolute before it hands its settings on, and
refuses one where there is nothing. A setting that names files says so by its type: ``path:
LocalPath``, in plug-ins kept elsewhere too.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field

from rlalign.core.registry import UserError

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class NamesFile:
    """Marks a setting whose value is the path of a file or folder; "" names none."""

    never: str = ""
    """What is no path, as a pattern, whatever files there are: a name that a library knows."""
    unless: str = ""
    """What a value may be, as a pattern, where there is no file of that name: a hub id."""
    is_glob: bool = False
    """Whether the value may also be a pattern of paths."""
    may_come: bool = False
    """Whether the file may be made later."""


URL = r"[a-z][a-z0-9+.-]*://.*"
_HUB_ID = r"(?!.*\.safetensors$)\w[\w.-]*/\w[\w.-]*"

LocalPath = Annotated[str, NamesFile()]
LocalPattern = Annotated[str, NamesFile(is_glob=True)]
LocalPathOrHubId = Annotated[str, NamesFile(unless=_HUB_ID)]
PathToBeOrUrl = Annotated[str, NamesFile(never=URL, may_come=True)]
TokenizerPathOrHubId = Annotated[str, NamesFile(unless=rf"\w[\w.-]*|{_HUB_ID}")]
"""The hub's oldest ids, of language models, have no owner."""
ArchitecturePath = Annotated[
    str,
    NamesFile(never=r".*(?<!\.json)"),
    Field(description="any name that open_clip knows, or a JSON file"),
]
"""A JSON file, or the name of an architecture."""


def locate(settings: Settings, place: str = "", *, here: bool = True) -> Settings:
    """The settings with every path made absolute, from the folder that this process is in;
    ``place`` is where they stand.

    Raises UserError for a path where there is nothing, with the place that was looked at. ``here``
    false: the work is done on other machines, which may have what an absolute path names and this
    one has not.
    """
    return _located(settings, place, Path.cwd(), here)


def _located(settings: Settings, place: str, base: Path, here: bool) -> Settings:
    changes: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        mark = next((m for m in field.metadata if isinstance(m, NamesFile)), None)
        found = _inside(value, mark, f"{place}.{name}".lstrip("."), base, here)
        if found is not value:
            changes[name] = found
    if not changes:
        return settings
    copied = settings.model_copy(update=changes)
    for derived in vars(copied).keys() - type(copied).model_fields.keys():
        # a cached property of the settings as they were
        delattr(copied, derived)
    return copied


def _inside(value: Any, mark: NamesFile | None, place: str, base: Path, here: bool) -> Any:
    """A setting's value, located; the same object where nothing in it changes."""
    if isinstance(value, BaseModel):
        return _located(value, place, base, here)
    if isinstance(value, tuple | list):
        found = [_inside(one, mark, f"{place}.{i}", base, here) for i, one in enumerate(value)]
        changed = any(new is not old for new, old in zip(found, value, strict=True))
        return type(value)(found) if changed else value
    if mark is None or not isinstance(value, str | Path) or not str(value):
        return value
    path = _path(str(value), mark, place, base, here)
    return value if path == str(value) else type(value)(path)


def _path(text: str, mark: NamesFile, place: str, base: Path, here: bool) -> str:
    if mark.never and re.fullmatch(mark.never, text):
        return text
    at = str(Path(base, text))
    is_absolute = Path(text).is_absolute()
    # os.path says false, and raises nothing, of what may not be looked at
    if mark.may_come or os.path.exists(at):  # noqa: PTH110
        return at
    if mark.unless and re.fullmatch(mark.unless, text):
        return text
    if mark.is_glob and glob.has_magic(text):
        return text if is_absolute else str(Path(glob.escape(str(base)), text))
    if is_absolute and not here:
        return text
    elsewhere = "" if here else "; what only other machines have is named by its absolute path"
    raise UserError(
        f"{place} must name a file or folder that is there, got {text!r}: there is nothing at"
        f" {at}{elsewhere}"
    )
