"""A denoiser that is spread over processes: the numbers of the whole one, and a share of its
memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.networks.spread_runs import BEHAVIOUR, GROUPS, RUNS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every process of every group has written what it ended with."""
    folder = tmp_path_factory.mktemp("spread")
    command = [sys.executable, "-m", "tests.networks.spread_runs", str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_and_four_processes_end_as_one_to_the_last_bit(name: str, ended: Path) -> None:
    """Weights, the optimiser's state, the average, the algorithm's copies, every metric and the
    distances from the pretrained weights, in every process."""
    whole = load_file(ended / f"{name}-1-0.safetensors")
    apart = ("held", "foretold")
    assert float(whole["metrics/grad_norm"]) > 0
    assert (float(whole["kl"]) > 0) == (RUNS[name][1] is not BEHAVIOUR)
    for count in GROUPS[1:]:
        for rank in range(count):
            found = load_file(ended / f"{name}-{count}-{rank}.safetensors")
            assert found.keys() == whole.keys()
            assert [n for n in whole if n not in apart and not found[n].equal(whole[n])] == []


@pytest.mark.parametrize("name", RUNS)
def test_a_process_holds_the_share_that_was_foretold(name: str, ended: Path) -> None:
    held = {}
    for count in GROUPS:
        for rank in range(count):
            found = load_file(ended / f"{name}-{count}-{rank}.safetensors")
            assert torch.equal(found["held"], found["foretold"])
            held[count] = int(found["held"])
    # beside the share are adapters and tables, which stay whole
    assert held[1] - held[2] > 0.4 * held[1]
    assert held[1] - held[4] > 0.6 * held[1]
