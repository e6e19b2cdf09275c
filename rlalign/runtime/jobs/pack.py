"""What a job needs and nothing else: the resolved run file, and plug-ins that are not installed
packages.

A plug-in is a string ``package.module:attribute`` in the run file. Its module goes along unless it
is Python's own or an installed package, and with it what it imports of the same kind.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from rlalign.core.registry import UserError

_PLACE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


def plugin_modules(settings: Any) -> list[str]:
    """Modules of every ``package.module:attribute`` among the values of resolved settings,
    sorted."""
    return sorted({m.group(1) for text in _strings(settings) if (m := _PLACE.fullmatch(text))})


def pack(text: str, settings: Any, folder: Path) -> list[str]:
    """Writes run.yaml and the local plug-ins into ``folder``. Returns the packed files, relative to
    it."""
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    done: set[str] = set()
    for module in plugin_modules(settings):
        _pack_module(module.partition(".")[0], folder, done, needed_by=module)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _pack_module(top: str, folder: Path, done: set[str], needed_by: str) -> None:
    """Copies a top-level module or package, and the local ones that it imports."""
    # a module may be imported from several files
    if top in done:
        return
    done.add(top)

    # a missing module is a mistake of the user
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise UserError(f"{needed_by}: the module {top} cannot be found ({error})") from error
    if spec is None:
        raise UserError(
            f"{needed_by}: there is no module {top}; run the command where it can be imported"
        )

    # only modules outside the installed packages are copied
    source = _source(spec)
    if source is None or top == "rlalign":
        return  # the cluster has its own
    if source.is_dir():
        shutil.copytree(source, folder / top, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy2(source, folder / source.name)

    # a copied module needs the local modules that it imports
    for file in source.rglob("*.py") if source.is_dir() else [source]:
        for name in _imports(file):
            if _local(name):
                _pack_module(name, folder, done, needed_by=str(file))


def _is_local(source: Path) -> bool:
    """Not Python's own, not installed: it lies in a folder of the user's."""
    installed = {
        sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    return not any(source.resolve().is_relative_to(Path(folder).resolve()) for folder in installed)


def _local(name: str) -> bool:
    """Whether a name that a plug-in imports is one of the user's own modules."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False  # an optional import; the plug-in knows
    return spec is not None and name != "rlalign" and _source(spec) is not None


def _source(spec: ModuleSpec) -> Path | None:
    """The file or folder of a local module; None for one that is built in or installed."""
    if spec.submodule_search_locations:
        source = Path(next(iter(spec.submodule_search_locations)))
    elif spec.origin and spec.origin.endswith(".py"):
        source = Path(spec.origin)
    else:
        return None
    return source if _is_local(source) else None


def _imports(file: Path) -> Iterator[str]:
    """Top-level names that a file imports absolutely."""
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
