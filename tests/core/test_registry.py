"""Finding plug-ins by name, and every way in which a name or a setting can be wrong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlalign.core import registry
from rlalign.core.registry import (
    UserError,
    build,
    describe,
    load_class,
    names,
    nearest,
    plugin_name,
    read_reason,
)
from rlalign.rewards.jpeg import Jpeg

SOURCE = '''
from rlalign.rewards.base import Reward
from rlalign.core.registry import Recipe

class Sharpness(Reward):
    """How sharp. Source: nobody."""
    radius: int = 2

class NotAReward(Recipe):
    """Of no shelf."""

def function(): ...
'''


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """``my_lab`` on the path: plug-ins kept elsewhere."""
    (tmp_path / "my_lab.py").write_text(SOURCE)
    (tmp_path / "my_broken_lab.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_lab", None)


def message(shelf, settings, path=""):
    with pytest.raises(UserError) as caught:
        build(shelf, settings, path)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# names


@pytest.mark.parametrize("shelf", sorted(registry.SHELVES))
def test_names_are_the_folders_files(shelf):
    inside = {
        "prompts": "data/prompts",
        "limits": "learning/limits",
        "optimizers": "learning/optimizers",
    }
    folder = Path(registry.__file__).parents[1] / inside.get(shelf, shelf)
    assert names(shelf) == sorted(
        p.stem for p in folder.glob("*.py") if not p.stem.startswith("_") and p.stem != "base"
    )


def test_a_name_finds_its_class():
    assert load_class("rewards", "jpeg") is Jpeg
    assert plugin_name(Jpeg) == "jpeg"
    assert Jpeg().name == "jpeg"


def test_a_plugin_elsewhere_is_module_and_class():
    made = build("rewards", {"name": "my_lab:Sharpness", "radius": 3, "weight": 0.5})
    assert type(made).__name__ == "Sharpness"
    assert (made.radius, made.weight) == (3, 0.5)
    assert made.name == "my_lab:Sharpness" == type(made)().name
    assert made.title == "Sharpness"
    assert (
        message("rewards", {"name": "my_lab:Sharpness", "radious": 3})
        == "rewards.radious: unknown setting; did you mean 'radius'?"
    )


def test_a_recipe_passes_through():
    made = Jpeg(quality=50)
    assert build("rewards", made) is made


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Jpeg().quality = 3


# mistakes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jpg", "rewards[0].name: no plug-in 'jpg' on shelf rewards; did you mean 'jpeg'?"),
        ("base", "rewards[0].name: no plug-in 'base' on shelf rewards; "),
        ("__init__", "rewards[0].name: no plug-in '__init__' on shelf rewards; "),
        ("../secrets", "rewards[0].name: no plug-in '../secrets' on shelf rewards; "),
        ("qqq", "rewards[0].name: no plug-in 'qqq' on shelf rewards; known: "),
        ("", "rewards[0].name: no plug-in '' on shelf rewards; known: "),
        (
            "no_lab:X",
            (
                "rewards[0].name: rewards: cannot import 'no_lab' (No module named 'no_lab'); is it"
                " on PYTHONPATH?"
            ),
        ),
        (
            "my_broken_lab:X",
            "rewards[0].name: rewards: cannot import 'my_broken_lab' (No module named 'a_library",
        ),
        ("my_lab:Sharpnes", "rewards[0].name: rewards: module 'my_lab' has no class 'Sharpnes'"),
        ("my_lab:", "rewards[0].name: rewards: module 'my_lab' has no class ''"),
        (
            "my_lab:function",
            (
                "rewards[0].name: rewards: 'my_lab:function' must be a class derived from"
                " rlalign.rewards.base"
            ),
        ),
        (
            "my_lab:NotAReward",
            (
                "rewards[0].name: rewards: 'my_lab:NotAReward' must be a class derived from"
                " rlalign.rewards"
            ),
        ),
        (
            "rlalign.data.prompts.list:ListedPrompts",
            "rewards[0].name: rewards: 'rlalign.data.prompts.list:ListedPrompts' must",
        ),
        (
            ":Sharpness",
            (
                "rewards[0].name: rewards: a plug-in kept elsewhere is named package.module:Class,"
                " got ':Sharpness'"
            ),
        ),
        (
            "..lab:X",
            (
                "rewards[0].name: rewards: a plug-in kept elsewhere is named package.module:Class,"
                " got '..lab:X'"
            ),
        ),
    ],
)
def test_a_wrong_name(name, expected):
    assert message("rewards", {"name": name}, "rewards[0]").startswith(expected)


@pytest.mark.parametrize(
    "settings", ["jpeg", ["jpeg"], None, 3, {}, {"weight": 1.0}, {"name": 3}, {"name": None}]
)
def test_what_is_not_a_mapping_with_a_name(settings):
    expected = f"rewards[0] must be a mapping with a name, got {settings!r}; known: "
    assert message("rewards", settings, "rewards[0]").startswith(expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"qualty": 5}, "rewards[0].qualty: unknown setting; did you mean 'quality'?"),
        (
            {"zzz": 5},
            (
                "rewards[0].zzz: unknown setting; known: at_least, direction, frames, label, name,"
                " on_error, quality, units_per_call, weight"
            ),
        ),
        ({"quality": 0}, "rewards[0].quality must be >= 1, got 0"),
        ({"quality": 101}, "rewards[0].quality must be <= 100, got 101"),
        (
            {"quality": "high"},
            (
                "rewards[0].quality must be a valid integer, unable to parse string as an integer,"
                " got 'high'"
            ),
        ),
        (
            {"quality": 1.5},
            (
                "rewards[0].quality must be a valid integer, got a number with a fractional part,"
                " got 1.5"
            ),
        ),
        ({"quality": None}, "rewards[0].quality must be a valid integer, got None"),
        (
            {"direction": "up"},
            "rewards[0].direction must be 'compressible' or 'incompressible', got 'up'",
        ),
        ({"weight": [1]}, "rewards[0].weight must be a valid number, got [1]"),
    ],
)
def test_a_wrong_setting_names_place_rule_and_value(settings, expected):
    assert message("rewards", {"name": "jpeg", **settings}, "rewards[0]") == expected


def test_a_missing_setting():
    assert message("prompts", {"name": "file"}) == "prompts.path is required"


def test_strict_bounds():
    assert (
        message("algorithms", {"name": "ddpo", "clip_range": 0}, "algorithm")
        == "algorithm.clip_range must be > 0, got 0"
    )
    assert (
        message("algorithms", {"name": "ddpo", "clip_range": 1}, "algorithm")
        == "algorithm.clip_range must be < 1, got 1"
    )


def test_the_shelf_is_the_place_when_no_path_is_given():
    assert (
        message("rewards", {"name": "jpeg", "quality": 0}) == "rewards.quality must be >= 1, got 0"
    )


def test_nearest():
    assert nearest("stesp", ["steps", "rule"]) == "did you mean 'steps'?"
    assert nearest("xyz", ["steps", "rule"]) == "known: steps, rule"
    assert nearest("xyz", []) == "known: none"


# describing without importing


def test_describe_reads_the_source():
    found = {d.name: d for d in describe("rewards")}["jpeg"]
    assert found.summary.startswith("Compressibility or incompressibility")
    assert "2305.13301" in found.source
    assert found.settings == {"direction": "'compressible'", "quality": "95"}
    assert found.weights == ""
    weights = {d.name: d.weights for d in describe("rewards")}
    assert weights["imagereward"].startswith("ImageReward.pt of hub id THUDM/ImageReward")
    assert {d.name: d for d in describe("prompts")}["file"].settings["path"] == "required"


def test_describe_imports_neither_torch_nor_a_plugin():
    code = (
        "import sys\nfrom rlalign.core import registry\nfor shelf in registry.SHELVES:\n   "
        " registry.describe(shelf)\nprint([m for m in sys.modules if m == 'torch' or m == 'numpy'"
        " or m.startswith('rlalign.rewards')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def describe_source(tmp_path, text):
    path = tmp_path / "plugin.py"
    path.write_text(text)
    tree = ast.parse(path.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return registry._describe("plugin", tree, classes, "Reward")


def test_describe_finds_the_recipe_among_other_classes(tmp_path):
    found = describe_source(
        tmp_path,
        '"""A file."""\n'
        "class Helper:\n    pass\n"
        "class _Hidden(Reward):\n    x: int = 1\n"
        'class Real(base.Reward):\n    """It is this.\n\n    Source: a paper, eq. 3.\n    """\n'
        "    differentiable: ClassVar[bool] = False\n"
        "    _private: int = 0\n"
        "    given: float = Field(default=1e-3, gt=0)\n"
        "    made: dict = Field(default_factory=dict)\n"
        "    first: int = Field(7, ge=1)\n"
        "    needed: str = Field(description='x')\n"
        "    elided: str = Field(..., description='x')\n"
        "    bare: int\n",
    )
    assert found.summary == "It is this."
    assert found.source == "a paper, eq. 3."
    assert found.settings == {
        "given": "0.001",
        "made": "dict()",
        "first": "7",
        "needed": "required",
        "elided": "required",
        "bare": "required",
    }


def test_describe_takes_settings_of_the_classes_between(tmp_path):
    """A base of some plug-ins on the shelf has settings too; what is no plug-in is passed over."""
    found = describe_source(
        tmp_path,
        "class _Between(Reward):\n    path: str\n    more: int = 1\n"
        "class Live(Other):\n    def verb(self):\n        pass\n"
        'class Real(_Between):\n    """This."""\n    path: str = "x"\n    own: int = 2\n',
    )
    assert found.summary == "This."
    assert found.settings == {"path": "'x'", "more": "1", "own": "2"}
    shelf = {d.name: d for d in describe("policies")}
    shared = ["path", "negative_prompt", "embeddings", "decode_rows", "vae_tiling"]
    shared += ["compile", "channels_last"]
    assert list(shelf["stable_diffusion"].settings) == shared
    assert shelf["stable_diffusion"].settings["path"] == "required"
    assert list(shelf["tiny_flow"].settings) == [*shared, "t5_tokens"]
    assert shelf["tiny_flow"].settings["path"] == "''"


def test_describe_falls_back_on_the_files_docstring(tmp_path):
    found = describe_source(
        tmp_path, '"""The file says it. Source: here."""\nclass Real(Reward):\n    x: int = 1\n'
    )
    assert found.summary == "The file says it. Source: here."
    assert found.source == "here."


def test_every_plugin_file_parses_as_it_is_described():
    for shelf in registry.SHELVES:
        for one in describe(shelf):
            assert all(
                ast.parse(default, mode="eval")
                for default in one.settings.values()
                if default != "required"
            )


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (OSError(), "OSError", "OSError"),
        (AssertionError(" \n\t\n"), "AssertionError", "AssertionError"),
        (ValueError("\n one\ntwo \n\n"), "one", "two"),
        (KeyError(), "KeyError", "KeyError"),
        (StopIteration("only"), "only", "only"),
        (
            FileNotFoundError(2, "No such file or directory", "a\nb"),
            "[Errno 2] No such file or directory: 'a\\nb'",
            None,
        ),
    ],
)
def test_a_reason_is_one_line_and_never_nothing(error, first, last):
    assert read_reason(error) == first
    assert read_reason(error, -1) == (last or first)


def test_nobody_else_cuts_an_error_into_lines():
    """An exception without a text has no line to take."""
    package = Path(registry.__file__).parent
    cut = re.compile(r"str\([\w.\[\]]+\)[.strip()]*\.splitlines\(\)(?!\[:)")
    found = [str(f) for f in package.rglob("*.py") if cut.search(f.read_text(encoding="utf-8"))]
    assert found == [registry.__file__]


def test_a_failure_without_words_is_named_by_its_class(tmp_path, monkeypatch):
    import safetensors.torch

    def fail(*_):
        raise OSError

    policy = build("policies", {"name": "points"}, "policy").load("cpu")
    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    with pytest.raises(UserError, match=r"\(OSError\)"):
        policy.family.read(tmp_path)
