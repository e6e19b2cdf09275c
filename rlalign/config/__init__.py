"""The Run: one YAML file becomes frozen models; every error carries its path, the rule, the value
and a "did you mean".

settings.py  the Run, and what must fit together
runtime.py   the settings of its runtime: who does the work and where
refit.py     the settings of a reward that it fits anew
files.py     YAML in and out, overrides by dotted path
earlier.py   runs of earlier versions: what their config.yaml means
spelling.py  the runtime's settings as they were spelt before
resume.py    which settings may change where a run goes on
derive.py    what follows from a Run: the JSON Schema of a run file, the numbers that ``rlalign
             check`` prints

May import the rooms whose settings a Run is made of (learning) and the bases of the shelves. To add
a setting, add a field to the room that it belongs to: it appears here, in the schema and in every
run folder by itself.
"""

from __future__ import annotations

from rlalign.config.derive import schema, summarise_run
from rlalign.config.earlier import fill_earlier, identity_of, load_begun, plain_identity_of
from rlalign.config.files import (
    dump,
    load_mapping,
    load_run,
    load_settings,
    locate_run,
    override,
    parse,
    parse_plugins,
    parse_run,
    parse_yaml,
    read_yaml,
    resolved,
)
from rlalign.config.resume import refuse_changes, refuse_fixed
from rlalign.config.runtime import RuntimeSettings
from rlalign.config.settings import Run

__all__ = [
    "Run",
    "RuntimeSettings",
    "dump",
    "fill_earlier",
    "identity_of",
    "load_begun",
    "load_mapping",
    "load_run",
    "load_settings",
    "locate_run",
    "override",
    "parse",
    "parse_plugins",
    "parse_run",
    "parse_yaml",
    "plain_identity_of",
    "read_yaml",
    "refuse_changes",
    "refuse_fixed",
    "resolved",
    "schema",
    "summarise_run",
]
