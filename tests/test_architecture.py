"""Who may import whom, where Ray may appear, and how large things may grow; read off the source
with ``ast``.

Imports nothing of rlalign. Every finding is ``file:line: rule``. The checker itself is tested on
made-up trees below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room is a package right under rlalign/. A row imports from rows below it only; rooms on one row
# do not know each other, but policies and rewards may know each other's base.py. A module whose
# name begins with an underscore is private to its folder.
ROWS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("diffusion", "ballots"),
    ("web", "storage"),
    ("data",),
    ("networks",),
    ("policies", "rewards", "sinks"),
    ("algorithms", "learning", "engine"),
    ("report",),
    ("config", "fitting", "samplers"),
    ("alignment",),
    ("sampling", "voting"),
    ("runtime",),
    ("cli",),
    ("__main__", "__init__"),
)
ROW = {room: index for index, rooms in enumerate(ROWS) for room in rooms}

SHELVES = {
    "policies": "policies",
    "rewards": "rewards",
    "algorithms": "algorithms",
    "samplers": "samplers",
    "data.prompts": "data",
    "learning.limits": "learning",
    "learning.optimizers": "learning",
    "sinks": "sinks",
}
"""Shelf package -> its room. From outside its room, only ``base`` of a shelf may be imported;
plug-ins load by name."""

NARROW = {
    "algorithms": {"core", "diffusion", "networks.critic", "policies.base", "rewards.base"},
    "samplers": {
        "core",
        "diffusion",
        "engine",
        "networks.noisy_classifier",
        "policies.base",
        "rewards.base",
    },
}
"""Rooms with a shorter list than "everything below": what objectives need is maths and the two
bases."""

HEAVY = {"accelerate", "diffusers", "matplotlib", "open_clip", "pandas", "peft", "ray", "scipy"}
HEAVY |= {"mlflow", "tensorboard", "tensorboardX", "torchvision", "transformers", "wandb"}
"""Imported inside functions outside runtime/, so that ``import rlalign`` and ``rlalign list`` stay
quick."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 399, 45, 7
"""A function's lines are counted without its docstring."""

# What breaks a rule on purpose, and why. Keys: "importer -> imported" | "file" | "file:function" |
# "file:function()".
EXCEPTIONS: dict[str, str] = {
    "rlalign/cli/ballots.py:ballots()": "a command's options are parameters, as typer has it",
    "rlalign/cli/serve.py:serve_reward()": "a command's options are parameters, as typer has it",
    "rlalign/diffusion/steps.py:step()": (
        "the seven arguments of every step rule, and which rule it is"
    ),
    "rlalign/policies/_policy.py:sample()": (
        "what a picture is made with, each by its own keyword, as diffusers' pipelines take it"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import of a module, with ``importer`` and ``target`` as dotted names without the leading
    ``rlalign.``."""

    place: str
    importer: str
    target: str
    own: bool
    """Whether the target is part of rlalign."""
    top: bool
    """Whether it runs when the module is imported."""


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def module_name(file: Path, package: Path) -> str:
    parts = list(file.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imports_of(tree: ast.Module, file: Path, package: Path, modules: set[str]) -> Iterator[Import]:
    """Every import in a module; ``from rlalign.data import x`` names the submodule x where there is
    one."""
    importer = module_name(file, package)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        names = _targets(node, importer, file.stem == "__init__")
        if not names:
            continue
        place = f"{file.relative_to(package.parent)}:{node.lineno}"  # type: ignore[attr-defined]
        top = not any(
            isinstance(a, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for a in _ancestors(node, parents)
        )
        top = top and not any(
            isinstance(a, ast.If) and "TYPE_CHECKING" in ast.unparse(a.test)
            for a in _ancestors(node, parents)
        )
        for name in names:
            own = name == "rlalign" or name.startswith("rlalign.")
            target = name.removeprefix("rlalign").removeprefix(".") if own else name
            while own and target and target not in modules:
                target = target.rpartition(".")[0]
            yield Import(
                place=place, importer=importer, target=target or "__init__", own=own, top=top
            )


def _targets(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = (
                ["rlalign", *importer.split(".")]
                if importer != "__init__"
                else ["rlalign", "__init__"]
            )
            up = node.level - 1 if is_package and importer != "__init__" else node.level
            base = ".".join([*here[: len(here) - up], *([base] if base else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("import_module", "__import__"))
        and node.args
    ):
        first = node.args[0]
        return (
            [first.value]
            if isinstance(first, ast.Constant) and isinstance(first.value, str)
            else []
        )
    return []


def _ancestors(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def import_finding(one: Import) -> str | None:
    """The rule that an import breaks, or None."""
    outer = one.target.split(".")[0]
    here = room(one.importer)
    if not one.own:
        if outer == "ray" and here != "runtime":
            return "ray is imported in rlalign/runtime/ only"
        if outer in HEAVY or one.target.startswith("torch.utils.tensorboard"):
            return (
                f"{outer} is heavy: import it inside the function that needs it"
                if one.top and here != "runtime"
                else None
            )
        return None
    private = next(
        (
            part
            for part in one.target.split(".")
            if part.startswith("_") and not part.startswith("__")
        ),
        None,
    )
    if private and not one.importer.startswith(one.target.split(f".{private}")[0] + "."):
        return f"{one.target} is private to its folder"
    there = room(one.target)
    if here not in ROW or there not in ROW:
        unknown = here if here not in ROW else there
        return (
            f"room {unknown!r} is in no row of ROWS (tests/test_architecture.py): give it a place"
        )
    if here == there or there == "__init__":
        return None
    shelf = next((s for s in SHELVES if one.target.startswith(s + ".")), None)
    if shelf and one.target != f"{shelf}.base":
        return f"{one.target} is a plug-in: other rooms know its shelf's base.py only"
    if here in NARROW and not NARROW[here] & {one.target, there}:
        return (
            f"{here} may import {', '.join(sorted(NARROW[here])) or 'nothing'} of rlalign, not"
            f" {one.target}"
        )
    if ROW[here] == ROW[there] and not (shelf and ROW[here] == ROW["policies"]):
        return f"{here} and {there} are rooms of one row: they do not know each other"
    if ROW[here] < ROW[there]:
        return f"{here} lies below {there}: imports go downwards only"
    return None


def cycles(edges: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """(place, path) of each import cycle, found depth first; ``edges[a][b]`` is the place where a
    imports b."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> Iterator[tuple[str, str]]:
        for target, place in sorted(edges.get(module, {}).items()):
            if target in path:
                yield place, " -> ".join([*path[path.index(target) :], target])
            elif target not in done:
                yield from visit(target, [*path, target])
        done.add(module)

    for start in sorted(edges):
        if start not in done:
            yield from visit(start, [start])


def size_findings(tree: ast.Module, name: str, lines: int) -> Iterator[tuple[str, str, str]]:
    """(exception key, place, rule) for a file or function that is too large."""
    if lines > MAX_FILE_LINES:
        yield name, f"{name}:1", f"file has {lines} lines; under {MAX_FILE_LINES + 1}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        place = f"{name}:{node.lineno}"
        docstring = ast.get_docstring(node, clean=False)
        of_docstring = docstring.count("\n") + 1 if docstring else 0
        length = (node.end_lineno or node.lineno) - node.lineno + 1 - of_docstring
        if length > MAX_FUNCTION_LINES:
            yield (
                f"{name}:{node.name}",
                place,
                f"{node.name} has {length} lines; under {MAX_FUNCTION_LINES + 1}",
            )
        arguments = [
            a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        ]
        count = len([a for a in arguments if a not in ("self", "cls")])
        if count > MAX_ARGUMENTS:
            yield (
                f"{name}:{node.name}()",
                place,
                f"{node.name} takes {count} arguments; under {MAX_ARGUMENTS + 1}",
            )


def encoding_findings(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """(place, rule) for a text file that is opened in whatever encoding the locale has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        modes = node.args[: 1 if owner else 2] + [k.value for k in node.keywords if k.arg == "mode"]
        is_text = called in ("read_text", "write_text") and owner not in ("checkpoint", "")
        if called == "open" and owner not in ("os", "Image", "Store"):
            is_text = not any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)
        if is_text and not any(k.arg == "encoding" for k in node.keywords):
            yield (
                f"{name}:{node.lineno}",
                f"{called} needs an encoding: text files are UTF-8 in every locale",
            )


def check(package: Path, exceptions: dict[str, str]) -> list[str]:
    """Every finding in a package tree as ``file:line: rule``, and every exception that excuses
    nothing."""
    files = sorted(package.rglob("*.py"))
    modules = {module_name(f, package) for f in files}
    found: list[str] = []
    used: set[str] = set()
    edges: dict[str, dict[str, str]] = {}

    def report(key: str, place: str, rule: str) -> None:
        if key in exceptions:
            used.add(key)
        else:
            found.append(f"{place}: {rule}")

    for file in files:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(file))
        for one in imports_of(tree, file, package, modules):
            rule = import_finding(one)
            if rule:
                report(f"{one.importer} -> {one.target}", one.place, rule)
            if one.own and one.target not in (one.importer, "__init__"):
                edges.setdefault(one.importer, {}).setdefault(one.target, one.place)
        for key, place, rule in size_findings(
            tree, str(file.relative_to(package.parent)), len(text.splitlines())
        ):
            report(key, place, rule)
        for place, rule in encoding_findings(tree, str(file.relative_to(package.parent))):
            report(place, place, rule)
    for place, path in cycles(edges):
        report(path, place, f"import cycle {path}")
    return sorted(set(found)) + [
        f"EXCEPTIONS[{key!r}] excuses nothing: remove it" for key in exceptions if key not in used
    ]


def test_rlalign_keeps_to_its_architecture() -> None:
    findings = check(ROOT / "rlalign", EXCEPTIONS)
    assert not findings, "\n" + "\n".join(findings)


def made_up(folder: Path, **files: str) -> Path:
    """A package tree of the given modules; "a__b" is a/b.py."""
    package = folder / "rlalign"
    for name, text in files.items():
        file = package.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        (file.parent / "__init__.py").touch()
    return package


@pytest.mark.parametrize(
    ("files", "place", "rule"),
    [
        ({"core__a": "import rlalign.config", "config": ""}, "core/a.py:1", "downwards only"),
        (
            {"networks__a": "\nfrom rlalign import config", "config": ""},
            "networks/a.py:2",
            "downwards only",
        ),
        (
            {"learning__a": "def f():\n    from rlalign.engine import x", "engine": ""},
            "learning/a.py:2",
            "one row",
        ),
        (
            {"report__a": "from rlalign.algorithms._b import x", "algorithms___b": ""},
            "report/a.py:1",
            "private",
        ),
        (
            {"samplers__a": "from rlalign.report import x", "report": ""},
            "samplers/a.py:1",
            "may import",
        ),
        (
            {"algorithms__a": "from rlalign.policies.sd3 import P", "policies__sd3": ""},
            "algorithms/a.py:1",
            "base.py only",
        ),
        (
            {"config": "from rlalign.data.prompts import file", "data__prompts__file": ""},
            "config.py:1",
            "base.py only",
        ),
        (
            {"algorithms__a": "from rlalign.data import shapes", "data__shapes": ""},
            "algorithms/a.py:1",
            "may import",
        ),
        (
            {"rewards__a": "from ..config import x", "config": ""},
            "rewards/a.py:1",
            "downwards only",
        ),
        (
            {"alignment__loop": "def f():\n    import ray.data"},
            "alignment/loop.py:2",
            "runtime/ only",
        ),
        (
            {"alignment__loop": "import importlib\nimportlib.import_module('ray')"},
            "alignment/loop.py:2",
            "runtime/ only",
        ),
        (
            {"report__a": "try:\n    import matplotlib.pyplot as plt\nexcept ImportError: pass"},
            "report/a.py:2",
            "heavy",
        ),
        (
            {"learning__metrics": "from torch.utils.tensorboard import SummaryWriter"},
            "learning/metrics.py:1",
            "heavy",
        ),
        (
            {"diffusion__a": "from rlalign.diffusion import b", "diffusion__b": "from .a import x"},
            "diffusion/b.py:1",
            "cycle",
        ),
        (
            {"attic": "from rlalign import records", "records": ""},
            "attic.py:1",
            "'attic' is in no row",
        ),
        ({"alignment__loop": "x = 0\n" * 400}, "alignment/loop.py:1", "400 lines"),
        (
            {"alignment__loop": 'def f():\n    """Two\n    lines."""\n' + "    pass\n" * 45},
            "alignment/loop.py:1",
            "f has 46 lines",
        ),
        (
            {"alignment__loop": "from pathlib import Path\nPath('a').read_text()"},
            "alignment/loop.py:2",
            "read_text needs an encoding",
        ),
        (
            {"alignment__loop": "def f(p):\n    p.write_text('a')"},
            "alignment/loop.py:2",
            "write_text needs an encoding",
        ),
        (
            {"alignment__loop": "def f(p):\n    return p.open('a+')"},
            "alignment/loop.py:2",
            "open needs an encoding",
        ),
        (
            {"alignment__loop": "handle = open('a')"},
            "alignment/loop.py:1",
            "open needs an encoding",
        ),
        (
            {"alignment__loop": "class A:\n    def f(self, a, b, c, d, *, e, g, h, i): ..."},
            "alignment/loop.py:2",
            "f takes 8 arguments",
        ),
    ],
)
def test_the_checker_finds_each_violation(
    tmp_path: Path, files: dict[str, str], place: str, rule: str
) -> None:
    findings = check(made_up(tmp_path, **files), {})
    assert len(findings) == 1
    assert findings[0].startswith(f"rlalign/{place}: ")
    assert rule in findings[0]


def test_the_checker_passes_what_is_allowed(tmp_path: Path) -> None:
    package = made_up(
        tmp_path,
        core__registry="class UserError(ValueError): ...",
        core__records="import torch",
        networks__lora="from rlalign.core.registry import UserError",
        policies__base="from rlalign.networks import lora\nfrom rlalign.core.records import Plan",
        algorithms___maths="import torch",
        policies__sd3="def load():\n    import diffusers\n",
        rewards__a="from rlalign.policies.base import Policy",
        algorithms__a=(
            "from rlalign.policies.base import Policy\nfrom rlalign.algorithms._maths import ratio"
        ),
        runtime__pool="import ray\nfrom rlalign import __version__",
        cli=(
            "from rlalign.runtime import pool\ndef f(p):\n    p.open('rb'), open('a', 'wb'),"
            " p.read_text(encoding='utf-8')"
        ),
        learning__learner=(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from accelerate import"
            " Accelerator"
        ),
    )
    assert check(package, {}) == []


def test_an_exception_excuses_one_finding_and_must_be_used(tmp_path: Path) -> None:
    package = made_up(tmp_path, core__a="from rlalign import report", report="")
    assert check(package, {"core.a -> report": "why"}) == []
    findings = check(package, {"core.a -> report": "why", "loop.py": "why"})
    assert findings == ["EXCEPTIONS['loop.py'] excuses nothing: remove it"]
