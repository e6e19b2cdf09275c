"""The Run: one YAML file becomes frozen models; every error carries its path, the rule, the value and a "did you mean".

settings.py  the Run, the runtime's settings, and what must fit together
files.py     YAML in and out, overrides by dotted path
derive.py    what follows from a Run: the JSON Schema of a run file, the numbers that ``rlalign check`` prints

May import the rooms whose settings a Run is made of (learner, evaluate, checkpoint) and the bases of the shelves. To add a
setting, add a field to the room that it belongs to: it appears here, in the schema and in every run folder by itself.
"""

from __future__ import annotations

from rlalign.config.derive import derived, schema
from rlalign.config.files import (
    dump,
    identity_of,
    load_mapping,
    load_run,
    load_settings,
    override,
    parse,
    parse_plugins,
    parse_run,
    parse_yaml,
    read_yaml,
    resolved,
)
from rlalign.config.settings import Run, RuntimeSettings

__all__ = [
    "Run",
    "RuntimeSettings",
    "derived",
    "dump",
    "identity_of",
    "load_mapping",
    "load_run",
    "load_settings",
    "override",
    "parse",
    "parse_plugins",
    "parse_run",
    "parse_yaml",
    "read_yaml",
    "resolved",
    "schema",
]
