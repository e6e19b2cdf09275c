"""Learners that hold a part of the trained weights each (``learner.shard: all``): repeatable to the
last bit at one number of processes, as one whole learner up to rounding, and resumed at another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.cli.check import memory
from rlalign.core.registry import UserError
from rlalign.learning import checkpoint
from rlalign.learning.checkpoint import read_newest
from rlalign.networks.sharding import bytes_of_share
from tests.learning.shard_runs import BRIEF, run_of_all
from tests.networks.spread_runs import run_alone

pytestmark = pytest.mark.promise

PROGRAM = "tests.learning.shard_runs"
OTHERS = ("flux", "sd35", "wan", "wan22", "pixart")
NAMES = [BRIEF, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
APART = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the way that weights have gone: how far a spread learner may be from a whole one."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(PROGRAM, tmp_path_factory.mktemp("all"), [BRIEF])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(PROGRAM, tmp_path_factory.mktemp("all"), OTHERS)


@pytest.fixture
def ended(name: str, request: pytest.FixtureRequest) -> Path:
    """The folder of a model's runs."""
    found: Path = request.getfixturevalue("others" if name in OTHERS else "first")
    return found / name


def told_in(folder: Path, place: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{place}-{rank}.json").read_text())
    return found


def tensors_of(folder: Path, place: str) -> Mapping[str, torch.Tensor]:
    found = read_newest(folder / place)
    assert found.round == 2
    return found.tensors


def distance(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], start: Mapping[str, Any]
) -> float:
    """How far weights are apart, by how far the first have gone from ``start``."""
    names = [n for n in one if n.startswith("policy/")]
    assert one.keys() == other.keys()
    apart = sum(float((one[n] - other[n]).double().square().sum()) for n in names)
    gone = sum(float((one[n] - start[n[7:]]).double().square().sum()) for n in names)
    return (apart / gone) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_one_number_of_processes_repeats_to_the_last_bit(name: str, ended: Path) -> None:
    """Resumed from its first round: weights, moments, the average and the algorithm's copies; and
    what is measured."""
    found = tensors_of(ended, "two-2")
    wanted = tensors_of(ended, "two")
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []
    again = told_in(ended, "two-2")
    assert again["line"] == told_in(ended, "two")["line"]
    assert again["kl"] == told_in(ended, "two")["kl"] == told_in(ended, "two", 1)["kl"]
    assert again["notes"] == []


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_of_processes_end_there_up_to_rounding(name: str, ended: Path) -> None:
    """Two processes from the start; three, and one that holds all weights, from the first round of
    two; two from the first round of a whole one. Each says that it goes on in another order."""
    changes = {"two-1": ("spread over 2 learners", "whole in every learner")}
    if name != BRIEF:
        changes["two-3"] = ("spread over 2 learners", "spread over 3 learners")
        changes["whole-2"] = ("whole in every learner", "spread over 2 learners")
    recipe = run_of_all(name, ended / "model").policy
    whole = tensors_of(ended, "whole")
    start = recipe.load("cpu").weights()
    for place in ("two", *changes):
        assert distance(whole, tensors_of(ended, place), start) < APART[recipe.precision], place
        line = told_in(ended, place)["line"]
        assert line == pytest.approx(told_in(ended, "whole")["line"], rel=3e-2, abs=1e-4)
    for place, (before, now) in changes.items():
        (note,) = told_in(ended, place)["notes"]
        assert f"were {before} up to round 1 and were {now}" in note["note"]


@pytest.mark.parametrize("name", NAMES)
def test_a_process_holds_the_part_that_was_foretold(name: str, ended: Path) -> None:
    run = run_of_all(name, ended / "model")
    policy = run.policy.load("cpu")
    family: Any = policy.family
    held = {}
    places = {1: "whole", 2: "two"} | ({} if name == BRIEF else {3: "two-3"})
    for count, place in places.items():
        workers = run.runtime.learner.model_copy(update={"workers": count})
        runtime = run.runtime.model_copy(update={"learner": workers})
        kept = memory.learning(run.model_copy(update={"runtime": runtime}), policy)
        wanted = sum(bytes_of_share(net, count)[0] for net in family.denoisers.values())
        wanted += sum(n for part, n in kept.items() if part not in ("gradients", memory.ASIDE))
        held[count] = told_in(ended, place)["held"]
        assert held[count] == wanted
    assert held[2] < 0.6 * held[1]
    assert held.get(3, 0) < 0.45 * held[1]


def lasting(file: Path) -> bytes | dict[str, Any]:
    """What a file says, but for how its tokenizer was asked last."""
    if file.name != "tokenizer.json":
        return file.read_bytes()
    return json.loads(file.read_text()) | {"truncation": None, "padding": None}


def test_the_export_is_that_of_the_whole_weights(first: Path, tmp_path: Path) -> None:
    folder = first / BRIEF
    run = run_of_all(BRIEF, folder / "model")
    policy = run.policy.load("cpu")
    policy.set_weights(checkpoint.read_weights(folder / "two", "average", "policy"))
    policy.save(tmp_path / "policy")
    mine = {f.relative_to(tmp_path): f for f in tmp_path.rglob("*") if f.is_file()}
    its = {f.relative_to(folder / "two"): f for f in (folder / "two" / "policy").rglob("*.*")}
    assert mine.keys() == its.keys()
    from safetensors.torch import load_file

    for name in mine:
        if name.suffix == ".safetensors":
            wanted = load_file(mine[name])
            found = load_file(its[name])
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        else:
            assert lasting(mine[name]) == lasting(its[name])


def test_a_full_disk_of_one_process_is_told_by_all(first: Path) -> None:
    for rank in (0, 1):
        said = told_in(first / BRIEF, "two", rank)["said"]
        assert "No space left on device; mend that, then" in said
    assert checkpoint.newest_round(first / BRIEF / "two") == 2


def test_a_process_that_dies_while_it_writes_leaves_the_older_one(first: Path) -> None:
    folder = first / BRIEF / "killed"
    assert checkpoint.newest_round(folder) == 1
    assert read_newest(folder).round == 1


def test_damage_of_a_part_is_named(first: Path, tmp_path: Path) -> None:
    source = checkpoint.folder_of(first / BRIEF / "two-2", 2)
    target = checkpoint.folder_of(tmp_path, 2)
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    assert len(list(target.glob("shard-*.safetensors"))) == 2
    whole = read_newest(tmp_path)
    (target / "state.json").write_text((target / "state.json").read_text().replace(": 2", ": 3"))
    with pytest.raises(UserError, match="state.json does not match the checksum"):
        read_newest(tmp_path)
    (target / "state.json").write_bytes((source / "state.json").read_bytes())
    with pytest.raises(UserError, match="belongs to another run"):
        checkpoint.latest(tmp_path, run_identity="another")
    shard = next(target.glob("shard-00002*"))
    blob = bytearray(shard.read_bytes())
    blob[-1] ^= 1
    shard.write_bytes(bytes(blob))
    with pytest.raises(UserError, match=r"is damaged: \S+ in shard-00002\S+ does not match"):
        list(whole.tensors.values())
