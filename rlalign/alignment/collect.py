"""Turning units of work into scored samples: what the loop asks for, and how one process does it.

``rlalign.runtime`` has the same over a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Protocol, cast

from rlalign.alignment.assemble import build_learner
from rlalign.alignment.words import encoding_reader
from rlalign.config import Run
from rlalign.core.progress import Tell, tell_nobody
from rlalign.core.records import Scored, Unit, Weights
from rlalign.engine import Cost, WorkResult
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Produce, Produced
from rlalign.learning.learner import Learner
from rlalign.networks.devices import usable
from rlalign.networks.embeddings import Reader
from rlalign.rewards.base import FittedScorer, total


class Collect(Protocol):
    """Turns units of work into scored samples, wherever that happens."""

    def order(self, units: Sequence[Unit], weights: Weights, reward: Weights | None = None) -> int:
        """Starts the units under these weights and returns a ticket. ``reward`` are those of the
        reward that a run fits anew; None leaves every reward as it was loaded."""
        ...

    def gather(self, ticket: int, tell: Tell = tell_nobody) -> list[Scored]:
        """Waits for a ticket's samples, in unit order; tells how many units are there."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Counters for the metrics line: restarts, driver bytes per sample."""
        ...

    def leaves(self) -> bool:
        """Whether a machine of the learner will be taken away, so that the run has to go on
        elsewhere. Asked of the main process, between two rounds."""
        ...


def local_parts(run: Run) -> tuple[LocalCollect, Learner]:
    """Who does the work of a run in one process, and who learns."""
    reader = encoding_reader(run.policy, run.runtime)
    return LocalCollect(run, reader), build_learner(run, reader)


class LocalCollect:
    """Units as pieces of work on the local engine: threads of this process, each with a replica of
    the policy and ``rollout.threads`` inside an operation."""

    def __init__(self, run: Run, reader: Reader | None = None) -> None:
        """``reader`` gives the words of prompts in place of text encoders of its own. Raises
        UserError where this machine does not have the run's device."""
        # the scorers are shared, what is counted is not
        self._run = run
        runtime = run.runtime
        device = usable(runtime.device, "runtime.device")
        scorers = {
            r.title: r.load_scorer(runtime.reward_device) for r in run.rewards_for("evaluate")
        }
        self._scorers = scorers

        # the policy and its lanes
        self._policy = run.policy.load(device, reader=reader)
        self._engine = LocalEngine.with_lanes(
            self._policy,
            lambda: LiveRewards(run.rewards, run.evaluate.rewards, scorers, strict=True),
            workers=runtime.rollout.workers,
            rows=run.samples_per_unit,
            threads=runtime.rollout.threads,
        )
        self._tag = self._reward_tag = ("", -1)
        self._tickets: dict[int, list[tuple[Produce, Future[WorkResult]]]] = {}
        self.cost = Cost()
        """Of everything that was gathered so far."""

    def order(self, units: Sequence[Unit], weights: Weights, reward: Weights | None = None) -> int:
        if self._tag != weights.tag:
            self._finish_units()
            self._policy.set_weights(dict(weights.tensors))
            self._tag = weights.tag
        if reward is not None and self._reward_tag != reward.tag:
            self._finish_units()
            scorer = cast(FittedScorer, self._scorers[reward.kind])
            scorer.set_weights(reward.tensors)
            self._reward_tag = reward.tag
        ticket = max(self._tickets, default=0) + 1
        works = [
            Produce(
                unit=unit,
                version=weights.version,
                spaces=self._run.spaces_for(unit.key.stream),
            )
            for unit in units
        ]
        self._tickets[ticket] = [(work, self._engine.submit(work)) for work in works]
        return ticket

    def _finish_units(self) -> None:
        """Units in flight finish under the weights they were ordered with."""
        for _, future in chain.from_iterable(self._tickets.values()):
            future.exception()

    def gather(self, ticket: int, tell: Tell = tell_nobody) -> list[Scored]:
        ordered = self._tickets.pop(ticket)
        scored = list[Scored]()
        for work, future in ordered:
            scored.append(self._scored(work, future.result()))
            tell(len(scored), len(ordered))
        return scored

    def facts(self) -> Mapping[str, float]:
        return {"restarts/rollout": 0, "restarts/reward": 0, "driver_bytes_per_sample": 0}

    def leaves(self) -> bool:
        return False

    def _scored(self, work: Produce, done: WorkResult) -> Scored:
        self.cost = self.cost + done.cost
        made: Produced = done.value
        return Scored(
            unit=work.unit,
            policy_version=work.version,
            raw=made.scores.raw,
            total_B=total(self._run.rewards, made.scores.raw, self._run.combine),
            trajectory=made.trajectory,
            media_BFCHW=made.samples.get("media"),
            seconds=made.seconds,
        )
