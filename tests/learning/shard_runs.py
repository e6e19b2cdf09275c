"""Runs of learners that hold a part of the trained weights each: of small random models, in groups
of one, two and three processes over gloo.

``python -m tests.learning.shard_runs FOLDER NAME...`` leaves run folders with checkpoints:

    whole    one process, which holds all weights; two rounds
    two      two processes, two rounds
    two-2    goes on in two processes from the first round of ``two``, and two-1 in one, which holds
             all weights
    killed   one of two processes dies while it writes the checkpoint of the second round

and for all models but ``BRIEF``

    two-3    goes on in three processes from the first round of ``two``
    whole-2  goes on in two from the first round of ``whole``
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 -- before processes are forked, which would import it each
import torch
import torch.distributed as group
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp

from rlalign.algorithms._memory import Memory
from rlalign.alignment import _weights
from rlalign.alignment.assemble import build_learner
from rlalign.config import Run
from rlalign.core.records import Scored
from rlalign.core.registry import UserError
from rlalign.learning import checkpoint, shard_files
from rlalign.learning.checkpoint import Checkpoint
from rlalign.learning.learner import Learner
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.networks.shares import own_part
from tests.networks.spread_runs import RUNS, collect, fork_group, run_with

BRIEF = "qwen_image"
"""The model of the default tests."""
SHARDS = 6
"""Twice the passes of an update, which are three: some shards have none, and of two processes one
has a pass fewer."""


def run_of_all(name: str, folder: Path) -> Run:
    """A run that trains all weights of a small model."""
    run = run_with(name, folder, shard="none", shards=SHARDS, lr=1e-3)
    policy = run.policy.model_copy(update={"lora_rank": 0, "adapter": ""})
    learner = run.learner.model_copy(update={"shard": "all"})
    kept = run.checkpoint.model_copy(update={"keep": 9})
    return run.model_copy(update={"policy": policy, "learner": learner, "checkpoint": kept})


def go_on(run: Run, scored: Sequence[Scored], folder: Path, upto: int) -> dict[str, Any]:
    """Takes up the newest checkpoint in a folder, or begins; learns up to a round from the same
    samples each time, and saves each round."""
    learner = build_learner(run)
    notes: list[dict[str, Any]] = []
    found = _weights.resume(learner, folder, run, notes.append)
    line: Mapping[str, float] = {}
    for round in range(1 if found is None else found.round + 1, upto + 1):
        line = learner.update(run.algorithm.make_batch(scored, Memory()), round=round)
        save(learner, folder, round, run)
    kl = learner.kl_to_pretrained(learner.weights(), scored[:1])
    told = {"line": dict(line), "kl": kl, "held": held_by(learner), "notes": notes}
    return {"learner": learner, "told": told}


def save(learner: Learner, folder: Path, round: int, run: Run) -> None:
    _weights.save(learner, folder, Checkpoint(round=round, tensors={}, facts={}), run)


def held_by(learner: Learner) -> int:
    """Bytes of weights, the optimiser's state and all copies of weights in this process."""
    policy = learner.policy
    tensors: list[Any] = [*policy.network.parameters(), *policy.network.buffers()]
    tensors += policy.reference.values()
    tensors += learner.base_weights().tensors.values()
    tensors += [t for n, t in learner.state_dict().items() if not n.startswith("policy/")]
    found = {}
    for one in map(own_part, tensors):
        storage = one.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() if one.ndim else 0
    return sum(found.values())


def full_disk(*_: Any) -> str:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(*_: Any) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


def run_all(name: str, folder: Path) -> None:
    """All runs of one model."""
    model = folder / "model"
    write_pipeline(model, FAMILIES[name], seed=1)
    run = run_of_all(name, model)
    scored = collect(run, run.policy.load("cpu"))
    (folder / "groups").mkdir()

    def tell(place: str, rank: int, told: Mapping[str, Any]) -> None:
        (folder / f"{place}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")

    def learn(place: str, rank: int) -> None:
        tell(place, rank, go_on(run, scored, folder / place, 2)["told"])

    def learn_two(rank: int) -> None:
        done = go_on(run, scored, folder / "two", 2)
        learner = done["learner"]
        if rank == 0:
            _weights.export(learner, folder / "two", learner.weights_to_show())
            for place in ("two-1", "two-2", "two-3", "killed"):
                copy_first(folder / "two", folder / place)
        group.barrier()
        learn("two-2", rank)
        if name != BRIEF:
            learn("whole-2", rank)

        # a disk that is full for one of them is told by both
        if rank == 1:
            shard_files.write_file = full_disk
        try:
            save(learner, folder / "two", 3, run)
        except UserError as error:
            done["told"]["said"] = str(error)
        tell("two", rank, done["told"])

        # one of them is killed while both write
        if rank == 1:
            shard_files.write_file = killed
        save(learner, folder / "killed", 2, run)

    check(fork_group(1, lambda rank: learn("whole", rank), folder / "groups" / "a"))
    copy_first(folder / "whole", folder / "whole-2")
    codes = fork_group(2, learn_two, folder / "groups" / "b")
    assert codes == [1, -signal.SIGKILL], codes
    if name != BRIEF:
        check(fork_group(3, lambda rank: learn("two-3", rank), folder / "groups" / "c"))
    read_with_torch(checkpoint.folder_of(folder / "two", 2))
    # not in this process, from which the next model's are forked: Accelerate keeps what it found
    check(fork_group(1, lambda rank: learn("two-1", rank), folder / "groups" / "d"))


def check(codes: Sequence[int]) -> None:
    assert not any(codes), codes


def copy_first(source: Path, target: Path) -> None:
    """The checkpoint of the first round."""
    shutil.copytree(checkpoint.folder_of(source, 1), checkpoint.folder_of(target, 1))


def read_with_torch(folder: Path) -> None:
    """What ``torch.distributed.checkpoint`` itself reads is what rlalign reads."""
    mine = checkpoint.read_newest(folder.parents[1]).tensors
    its = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
    dcp.load(its, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert [name for name in mine if not torch.equal(mine[name], its[name])] == []


def main(folder: Path, names: Sequence[str]) -> int:
    torch.set_num_threads(1)
    for name in names:
        assert name in RUNS
        run_all(name, folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
