"""What every test stands on: one thread, fixed seeds, one small Ray for those that ask for it, and
an end for what a test process leaves running."""

from __future__ import annotations

import os
import random

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

import numpy as np
import pytest
import torch

from tests import orphans

pytest_plugins = ["tests.whole_files"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Global generators start the same in every test; code under test draws from keyed ones."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for a module (a run starts and ends its own): eight logical CPUs, loopback
    only, no dashboard."""
    import ray

    assert not ray.is_initialized(), "a test started Ray by itself; ask for the fixture ray_cluster"
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Only where tests are run: not in the process that hands them to others (pytest-xdist)."""
    if not session.config.getoption("numprocesses", None):
        orphans.watch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files whose tests take longest come first, so that processes that share the tests end
    together: those that train whole runs, then those that start a Ray."""
    starts_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: ("end_to_end" not in item.path.parts, item.path not in starts_ray))
