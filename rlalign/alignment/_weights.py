"""What a run reads and writes of its learner's weights: checkpoints, and the exported policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlalign.config import Run, identity_of, plain_identity_of
from rlalign.core.files import replacing
from rlalign.core.records import Weights
from rlalign.learning import checkpoint
from rlalign.learning.checkpoint import Checkpoint
from rlalign.learning.learner import Learner

SPREAD = "learners_of_weights"
"""Fact of a checkpoint: over how many learners the trained weights were spread; left out where each
had all of them."""


def save(learner: Learner, folder: Path, saved: Checkpoint, run: Run) -> None:
    """Writes a checkpoint with the learner's state beside what ``saved`` holds: by the main learner
    or, where each holds a part of the weights, by all of them."""
    count = _learners_of_weights(learner)
    if count or learner.is_main:
        checkpoint.save(
            folder,
            replace(
                saved,
                tensors={**learner.state_dict(), **saved.tensors},
                facts={**saved.facts, **({SPREAD: count} if count else {})},
            ),
            run_identity=identity_of(run),
            keep=run.checkpoint.keep,
        )


def resume(
    learner: Learner, folder: Path, run: Run, on_record: Callable[[dict[str, Any]], None]
) -> Checkpoint | None:
    """The newest checkpoint, whose state the learner takes over; None where there is none. Says so
    where sums are taken in another order from here on."""
    found = checkpoint.latest(folder, run_identity=identity_of(run), older=plain_identity_of(run))
    if found is None:
        return None
    learner.load_state_dict(found.tensors)
    before = found.facts.get(SPREAD, 0)
    now = _learners_of_weights(learner)
    if before != now and learner.is_main:
        on_record(
            {
                "note": f"trained weights {_tell(before)} up to round {found.round} and"
                f" {_tell(now)} from there on: as the undisturbed run's up to rounding, not to the"
                " last bit"
            }
        )
    return found


def _learners_of_weights(learner: Learner) -> int:
    return learner.accelerator.num_processes if learner.policy.is_trained_spread else 0


def _tell(learners: int) -> str:
    return f"were spread over {learners} learners" if learners else "were whole in every learner"


def export(learner: Learner, folder: Path, weights: Weights) -> None:
    """Writes ``policy/`` under these weights; those that no process has whole are read from the
    checkpoint of the last round."""
    policy = learner.policy
    own = None
    if policy.is_trained_spread:
        own = checkpoint.read_weights(folder, "average", "policy")
    else:
        policy.set_weights(weights.tensors)
    with replacing(folder / "policy") as scratch:
        policy.save(scratch, own)
