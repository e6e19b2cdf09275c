"""Prints what rlalign needs to be built and to run, as pyproject.toml says.

An image installs it before the code.
"""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
print("\n".join([*project["build-system"]["requires"], *project["project"]["dependencies"]]))
