"""A small pipeline folder for the tests of how such folders are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of random weights; a test that changes it takes a copy."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "small")
