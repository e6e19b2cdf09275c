"""The undisturbed run that every other one is compared with, on the small model and on the embedded
one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlalign.config import Run
from tests.runs import points_run, quiet, small_run
from tests.toy import save_pipeline

RUNS = {"points": points_run, "quickstart": small_run}


@pytest.fixture(
    scope="session", params=["points", pytest.param("quickstart", marks=pytest.mark.slow)]
)
def small(request: pytest.FixtureRequest) -> Callable[..., Run]:
    """Makes a run of four rounds: what a loop, a stop or a kill does is the same on any model, so
    points in the plane are what the default tests train, and the embedded model the slow ones."""
    return RUNS[request.param]


@pytest.fixture(scope="session")
def local_run(small: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed reference: one process, one rollout lane."""
    from rlalign.alignment.loop import train_local

    folder = tmp_path_factory.mktemp("local") / "run"
    train_local(small("runtime.rollout.workers=1"), folder, resume=False, on_record=quiet)
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override: a Stable Diffusion pipeline of random weights, small enough for seconds."""
    return f"policy.path={save_pipeline(tmp_path_factory.mktemp('models') / 'pipeline')}"
