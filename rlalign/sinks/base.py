"""What a sink is: a recipe that connects to a writer of numbers, pictures and files."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rlalign.core.files import write_whole
from rlalign.core.registry import Recipe, UserError

_LOG_JSON = threading.Lock()
"""Sinks connect at the same time."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run that is logged."""

    folder: Path
    name: str
    settings: Mapping[str, Any]
    """The resolved run file; it holds no secrets."""
    resume_at: int
    """Round of the checkpoint that the run goes on from; -1 is none."""

    def kept_id(self, sink: str, make: Callable[[], str]) -> tuple[str, bool]:
        """The run's id with a sink, and whether it is new: made once and kept in ``log.json``, so
        that a run that goes on stays one there."""
        file = self.folder / "log.json"
        with _LOG_JSON:
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if sink in known:
                return known[sink], False
            known[sink] = make()
            write_whole(file, json.dumps(known, indent=1, sort_keys=True))
            return known[sink], True


class Writer(Protocol):
    """A live sink. Whatever it raises is told once and ends nothing."""

    def write(self, round: int, values: Mapping[str, float], /) -> None:
        """Finite numbers of a round, by metric."""
        ...

    def show(self, round: int, picture: Path, /) -> None:
        """A PNG of an evaluation; its file name says which. Where it shows clips, they lie beside
        it (``rlalign.core.pictures.clip_files``)."""
        ...

    def keep(self, file: Path, /) -> None:
        """A file of the run, whole: config.yaml, report.html."""
        ...

    def close(self, ended: bool, /) -> None:
        """Writes what is left; ``ended`` is whether the run came to its end."""
        ...


class Sink(Recipe):
    """Base of a sink. Keys are no settings: they come from the environment, so that they are in no
    file of a run."""

    shelf: ClassVar[str] = "sinks"
    package: ClassVar[str] = ""
    """What has to be installed beside rlalign, which is also the name of the extra."""

    def check(self, place: str) -> None:
        """Raises UserError, naming ``place``, where the sink cannot be used on this machine."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"{place}.name: {self.name} needs the package {self.package}, which is not"
                f" installed; pip install 'rlalign[{self.package}]', or leave it out"
            )

    def connect(self, origin: Origin) -> Writer:
        """The live writer."""
        raise NotImplementedError
