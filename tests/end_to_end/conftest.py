"""The undisturbed run that every other one is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import small_run


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed reference: one process, one rollout lane."""
    from rlalign.loop import train_local

    folder = tmp_path_factory.mktemp("local") / "run"
    train_local(small_run("runtime.rollout_workers=1"), folder, resume=False, on_record=lambda _: None)
    return folder
