"""A denoiser that is spread over processes: the numbers of the whole one, and a share of its
memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.networks.spread_runs import BEHAVIOUR, GROUPS, IN_STEP, RUNS, run_alone

PROGRAM = "tests.networks.spread_runs"
OTHERS = ("wan22", "pixart", "flux2_klein", "wan_i2v")
"""Two experts, of which learners ask different ones at a time; a model that is exported with its
adapter merged; further transformers."""
CASES = [pytest.param(name, marks=pytest.mark.promise if name in OTHERS else ()) for name in RUNS]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [name for name in RUNS if name not in OTHERS]
    return run_alone(PROGRAM, tmp_path_factory.mktemp("spread"), names)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(PROGRAM, tmp_path_factory.mktemp("spread"), OTHERS)


@pytest.fixture
def ended(name: str, request: pytest.FixtureRequest) -> Path:
    """The folder of a model's groups."""
    found: Path = request.getfixturevalue("second" if name in OTHERS else "first")
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """What was exported, by file."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", CASES)
def test_two_and_four_processes_end_as_one_to_the_last_bit(name: str, ended: Path) -> None:
    """Weights, the optimiser's state, the average, the algorithm's copies, every metric and the
    distance from the pretrained weights, in every process; and what is exported."""
    whole = load_file(ended / f"{name}-1-0.safetensors")
    apart = ("held", "foretold")
    assert float(whole["metrics/grad_norm"]) > 0
    assert (float(whole["kl"]) > 0) == (RUNS[name][1] is not BEHAVIOUR)
    if name == "wan22":
        assert 0 < float(whole["metrics/expert/high_share"]) < 1
    for count in GROUPS[1:]:
        for rank in range(count):
            found = load_file(ended / f"{name}-{count}-{rank}.safetensors")
            assert found.keys() == whole.keys()
            assert [n for n in whole if n not in apart and not found[n].equal(whole[n])] == []
        assert files_of(ended / f"{name}-{count}-exported") == files_of(
            ended / f"{name}-1-exported"
        )


@pytest.mark.parametrize("name", [case for case in CASES if case.values[0] in IN_STEP])
def test_processes_that_ask_in_step_sample_what_one_does(name: str, ended: Path) -> None:
    """Each units of its own, of unequal lengths, or none; after a pass that has failed."""
    whole = load_file(ended / f"{name}-1-0-made.safetensors")
    assert len(whole) == 3 * 3
    for count in GROUPS[1:]:
        parts = [load_file(ended / f"{name}-{count}-{r}-made.safetensors") for r in range(count)]
        found = {key: tensor for part in parts for key, tensor in part.items()}
        assert found.keys() == whole.keys()
        assert [key for key in whole if not found[key].equal(whole[key])] == []


@pytest.mark.parametrize("name", CASES)
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


def test_what_one_process_cannot_read_ends_all_of_them(first: Path) -> None:
    """The others would wait for it."""
    said = [(first / f"said-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert said == ["division by zero"] * 2
