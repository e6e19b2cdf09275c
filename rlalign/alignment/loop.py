"""The whole of alignment: produce, score, make a batch, learn. One loop, in one process or on a
cluster.

    order(units, weights) --> [ rollout -> rewards ] --> gather
              ^                                            |  Scored, in unit order
              |  weights, version                          v
           learner.update  <-----------------  algorithm.make_batch

``Collect`` is the only thing that differs: ``LocalCollect`` computes units on threads of this
process, ``rlalign.runtime`` has one that asks a cluster. Round r uses weights that are at most
``max_staleness`` rounds old; no round is ordered ahead across a checkpoint, so the schedule is the
same for a run that was stopped and resumed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from rlalign import storage
from rlalign.alignment import control
from rlalign.alignment._rounds import Alignment, OnRecord
from rlalign.alignment.collect import Collect, local_parts
from rlalign.config import Run, locate_run
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import Pairing, first_pair, open_pairs_of
from rlalign.learning import checkpoint, evaluate, folders
from rlalign.learning.learner import Learner
from rlalign.learning.log import check_sinks


def align(
    run: Run,
    folder: Path,
    collect: Collect,
    learner: Learner,
    on_record: OnRecord,
    *,
    pairs: Pairing | None = None,
) -> bool:
    """Runs (or goes on with) a run until its last round, then evaluates, exports and reports.
    Returns whether it has to go on on another machine, from the checkpoint that it has left.

    ``pairs`` reads the run's set of preferences; rlalign's own reader does where none is given.
    """
    with checkpoint.exclusive(folder) if learner.is_main else contextlib.nullcontext():
        alignment = Alignment(run, folder, collect, learner, on_record)
        if pairs is None and run.preferences is not None:
            pairs = open_pairs_of(run.preferences, run.seed, run.plan.frames)
        alignment.pairs = pairs
        if pairs is not None and pairs.note and learner.is_main:
            on_record({"note": f"preferences: {pairs.note}"})
        overlap = run.prompts.find_overlap() if run.preferences is None else None
        if overlap is not None and learner.is_main:
            on_record({"note": f"prompts: {overlap}"})
        try:
            alignment.resume()
            while alignment.goes_on and alignment.has_pairs():
                storage.check(folder, tell=lambda note: on_record({"note": note}))
                alignment.one_round()
            moves = alignment.leaves and not (alignment.asked_to_stop or alignment.guard.stopped)
            if not alignment.asked_to_stop and not moves:
                alignment.finish()
            return moves
        finally:
            alignment.close()


def train_local(run: Run, folder: Path | str, *, resume: bool, on_record: OnRecord) -> None:
    """A run in this process. ``folder`` may be a URL, as s3://bucket/runs/first; ``resume`` is the
    caller's word that it may already hold a run.

    Raises UserError where the folder holds a run that has begun, and ``resume`` is not said.
    """
    if run.preferences is not None and run.preferences.reader == "ray":
        raise UserError(
            "preferences.reader must be arrow with --local, got 'ray', which streams through Ray"
            " Data"
        )
    # what can be refused is refused before the run has a folder
    run = locate_run(run, begun=resume)
    check_sinks(run.log)
    if run.preferences is not None:
        first_pair(run.preferences, run.plan.frames)
    torch.set_num_threads(run.runtime.learner.threads)
    collect, learner = local_parts(run)

    def tell(note: str) -> None:
        on_record({"note": note})

    with (
        storage.own_run(folder, learns=True, tell=tell) as here,
        folders.owned(here, resume=resume),
    ):
        control.forget(here)
        status = control.Status(here, run.rounds, name=run.name)

        def record(line: dict[str, Any]) -> None:
            status.record(line)
            on_record(line)

        try:
            align(run, here, collect, learner, record)
        except BaseException as error:
            status.write(state="failed" if isinstance(error, Exception) else "stopped")
            raise
        status.write(state="ended" if evaluate.read_final(here, run.rounds) else "stopped")
