"""Names of the earlier layout: each still gives the module of its new name, with a warning, and
changes nothing in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlalign.core.moved import NEW_NAMES

CHECK = """
import gc, importlib, sys, warnings

gc.disable()  # no garbage is worth a look here
import rlalign
from rlalign.core.moved import NEW_NAMES

for old, new in sorted(NEW_NAMES.items()):
    if not importlib.util.find_spec(f"rlalign.{new}"):
        sys.exit(f"rlalign.{new} is not there")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = importlib.import_module(f"rlalign.{old}")
    home = importlib.import_module(f"rlalign.{new}")
    if found is not home or {home.__spec__.name, home.__name__} != {f"rlalign.{new}"}:
        sys.exit(f"rlalign.{old} gave {found}")
    if hasattr(home, "__path__") != home.__file__.endswith("__init__.py"):
        sys.exit(f"rlalign.{new} is a package, or no longer one")
    if not any(str(one.message) == f"rlalign.{old} is rlalign.{new} now" for one in said):
        sys.exit(f"rlalign.{old} came without a warning: {[str(one.message) for one in said]}")

from rlalign.registry import UserError
from rlalign.core.registry import UserError as home
from rlalign import registry

if UserError is not home or registry is not sys.modules["rlalign.core.registry"]:
    sys.exit("from rlalign.registry import UserError gave another class")
gc.freeze()
"""


@pytest.mark.promise
def test_every_old_name_gives_the_module_of_its_new_name() -> None:
    assert len(NEW_NAMES) > 60
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_not_found() -> None:
    code = (
        "import rlalign\ntry:\n    import rlalign.never\nexcept ModuleNotFoundError as error:\n   "
        " print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "No module named 'rlalign.never'\n", done.stderr
