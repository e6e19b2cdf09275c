"""The learner knows no algorithm by name."""

from __future__ import annotations

import re
from pathlib import Path

from rlalign.core import registry
from rlalign.learning import learner


def test_no_word_of_the_learner_is_an_algorithms() -> None:
    """Not a word of learner.py is an algorithm's name or class, in code, comments or docstrings."""
    text = Path(learner.__file__).read_text(encoding="utf-8")
    names = registry.names("algorithms")
    assert {"ddpo", "dpok", "diffusion_dpo"} <= set(names)
    words = {*names, *(registry.load_class("algorithms", name).__name__ for name in names)}
    found = sorted(word for word in words if re.search(rf"\b{word}\b", text, re.IGNORECASE))
    assert found == []
