"""What every test stands on: one thread, fixed seeds, one small Ray for those that ask for it, and
an end for what a test process leaves running."""

from __future__ import annotations

import gc
import os
import random
import shutil

# Ray and OpenMP read these when they are first imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # every server of Ray binds to loopback
os.environ["RAY_AUTH_MODE"] = (
    "disabled"  # nothing but loopback listens, and no token file is left in the home folder
)
# Ray makes its workers nice (15): beside busy processes they would get a twentieth of a core
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is wrong

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import orphans, shared_ray

pytest_plugins = ["tests.whole_files"]

gc.disable()  # until all is collected: what is imported stays

shares_ray: set[Path] = set()
"""Files whose every test of Ray asks for ``ray_cluster``."""


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
"""Of a Chromium in which tests look at pages."""


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Global generators start the same in every test; code under test draws from keyed ones."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One Chromium for all tests of a process."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray on which nothing runs: eight logical CPUs, loopback only, no dashboard. Files
    that follow one another in a process have it in turn."""
    shared_ray.start()
    yield
    shared_ray.clear()


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's page takes as long as its rounds: tests of something else leave it out."""
    monkeypatch.setattr("rlalign.report.write_report", lambda _: None)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only where tests are run: not in the process that hands them to others (pytest-xdist), which
    begins two seconds sooner without torch."""
    if session.config.getoption("numprocesses", None):
        return
    import torch

    torch.set_num_threads(1)
    orphans.watch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files whose tests take longest come first, so that processes that share the tests end
    together: those that train whole runs, then those that need a Ray, and of these first the ones
    that share it."""
    of_ray = [item for item in items if item.get_closest_marker("ray")]
    needs_ray = {item.path for item in of_ray}
    starts_own = {item.path for item in of_ray if "ray_cluster" not in fixtures_of(item)}
    shares_ray.update(needs_ray - starts_own)
    items.sort(
        key=lambda item: (
            "end_to_end" not in item.path.parts,
            item.path not in needs_ray,
            item.path not in shares_ray,
        )
    )


def fixtures_of(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def pytest_collection_finish() -> None:
    """The million objects of what has been imported stay until the end: no look for garbage need
    pass over them. What tests leave behind is looked for a little less often than usual."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A file that starts its own Ray, or none, finds none."""
    if item.path not in shares_ray:
        shared_ray.end()


def pytest_sessionfinish() -> None:
    """What is left is let go, or libraries in C++ complain of leaks."""
    shared_ray.end()
    gc.unfreeze()
