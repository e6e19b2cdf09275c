"""Copies of pipeline folders with something changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def copy_of(folder: Path, place: Path) -> Path:
    """A copy of a folder at ``place``."""
    return Path(shutil.copytree(folder, place))


def edit(file: Path, **settings: Any) -> None:
    """Changes settings in a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
