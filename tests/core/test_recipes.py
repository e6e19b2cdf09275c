"""Every plug-in on every shelf, found by its file: it pickles, round-trips through YAML, names its
source, has defaults."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys
from typing import Any

import pytest
import yaml

from rlalign.core import registry

PLUGINS = [(shelf, name) for shelf in sorted(registry.SHELVES) for name in registry.names(shelf)]

REQUIRED: dict[tuple[str, str], dict[str, Any]] = {
    ("limits", "diversity"): {"least": 0.5},
    ("limits", "held_out"): {"reward": "shapes"},
    ("limits", "kl"): {"most": 0.01},
    ("policies", "flux"): {"path": "models/some-pipeline"},
    ("policies", "cogvideox"): {"path": "models/some-pipeline"},
    ("policies", "hunyuan_video"): {"path": "models/some-pipeline"},
    ("policies", "ltx"): {"path": "models/some-pipeline"},
    ("policies", "planner"): {"path": "models/some-planner"},
    ("policies", "sd3"): {"path": "models/some-pipeline"},
    ("policies", "flux2"): {"path": "models/some-pipeline"},
    ("policies", "qwen_image"): {"path": "models/some-pipeline"},
    ("policies", "z_image"): {"path": "models/some-pipeline"},
    ("policies", "sana"): {"path": "models/some-pipeline"},
    ("policies", "pixart"): {"path": "models/some-pipeline"},
    ("policies", "sdxl"): {"path": "models/some-pipeline"},
    ("policies", "stable_diffusion"): {"path": "models/some-pipeline"},
    ("policies", "wan"): {"path": "models/some-pipeline"},
    ("policies", "wan_i2v"): {"path": "models/some-pipeline"},
    ("prompts", "file"): {"path": "prompts.txt"},
    ("prompts", "list"): {"prompts": ["a red circle", "a blue square"]},
    ("prompts", "mix"): {"sources": [{"share": 1.0, "prompts": {"name": "shapes"}}]},
    ("rewards", "aesthetic"): {"head": "head.safetensors"},
    ("rewards", "detour"): {"x": 0.5, "y": 0.0},
    ("rewards", "hazard"): {"x": 0.5, "y": 0.0},
    ("rewards", "function"): {"call": "math:fsum"},
    ("rewards", "hpsv2"): {"weights": "hpsv2.safetensors"},
    ("rewards", "hpsv3"): {"instruction": "data_collator_qwen.py"},
    ("rewards", "videoalign"): {
        "instruction": "prompt_template.py",
        "weights": "videoreward.safetensors",
    },
    ("rewards", "imagereward"): {"weights": "ImageReward.safetensors"},
    ("rewards", "vlm_judge"): {"model": "a-judge"},
}
"""The settings that cannot have a default, each with a value to build the recipe with."""


def recipe(shelf: str, name: str) -> registry.Recipe:
    return registry.build(shelf, {"name": name, **REQUIRED.get((shelf, name), {})})


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_settings_have_defaults_but_for_the_listed_ones(shelf: str, name: str) -> None:
    fields = registry.load_class(shelf, name).model_fields
    required = {field for field, info in fields.items() if info.is_required()}
    assert required == set(REQUIRED.get((shelf, name), {}))


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_it_knows_its_name_and_pickles(shelf: str, name: str) -> None:
    made = recipe(shelf, name)
    assert made.name == name
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert type(again) is type(made)


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_it_round_trips_through_yaml(shelf: str, name: str) -> None:
    made = recipe(shelf, name)
    written = yaml.safe_dump(made.model_dump(mode="json"))
    assert registry.build(shelf, yaml.safe_load(written)) == made


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_it_refuses_an_unknown_setting(shelf: str, name: str) -> None:
    settings = {"name": name, "no_such_setting": 1, **REQUIRED.get((shelf, name), {})}
    with pytest.raises(registry.UserError, match=r"here\.no_such_setting: unknown setting"):
        registry.build(shelf, settings, "here")


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_its_docstring_names_a_source(shelf: str, name: str) -> None:
    doc = registry.load_class(shelf, name).__doc__ or ""
    assert doc.splitlines()[0].strip(), "the first line says what it is"
    assert "Source:" in doc


@functools.cache
def described_of(shelf: str) -> dict[str, registry.Description]:
    """Name -> what ``describe`` reads of it."""
    return {one.name: one for one in registry.describe(shelf)}


@pytest.mark.parametrize(("shelf", "name"), PLUGINS)
def test_describe_lists_it_as_the_class_is(shelf: str, name: str) -> None:
    """``describe`` reads the source only; what it says must be true of the class that is loaded."""
    described = described_of(shelf)[name]
    cls = registry.load_class(shelf, name)
    first, *_ = (cls.__doc__ or "").split("\n\n")
    assert described.summary == " ".join(first.split())
    assert described.source
    assert set(described.settings) <= set(cls.model_fields)
    required = {field for field, default in described.settings.items() if default == "required"}
    assert required == set(REQUIRED.get((shelf, name), {}))


def test_listing_plug_ins_imports_nothing_heavy() -> None:
    """``rlalign list`` stays quick: neither Ray nor diffusers nor any plug-in is imported by it."""
    code = (
        "import sys\nfrom rlalign.core import registry\nfor shelf in registry.SHELVES:\n   "
        " registry.describe(shelf)\nheavy = {'ray', 'diffusers', 'transformers', 'peft',"
        " 'accelerate', 'matplotlib', 'scipy', 'torchvision'}\nprint(sorted(heavy &"
        " set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
