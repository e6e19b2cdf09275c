"""What the driver does while the learner works: shows records, keeps the pools as wanted, obeys
control.json, writes status.

It must not end before the run does. What Ray says of an actor that is away passes; anything else
that goes wrong here, such as in the caller's own ``on_record``, asks the run to stop with a
checkpoint and is raised in the driver's own thread when it has.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from rlalign import storage
from rlalign.alignment import control
from rlalign.config import Run
from rlalign.core.registry import UserError
from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from rlalign.runtime.training.coordinator import Failure, Standing
from rlalign.runtime.training.fleet import Fleet
from rlalign.runtime.training.scaling import Balance

OnRecord = Callable[[dict[str, Any]], None]
PERIOD_SECONDS = 0.5
_DRAINS = "of the run's nodes will be taken away: their work goes on elsewhere"


class Supervisor(threading.Thread):
    """A thread of the driver, from the start of the learner to its end."""

    def __init__(
        self, run: Run, folder: Path, fleet: Fleet, status: control.Status, on_record: OnRecord
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._run = run
        self._folder = folder
        self._fleet = fleet
        self._status = status
        self._on_record = on_record

        # the state of this thread
        self._over = threading.Event()
        self._epoch = ""
        self._seen = 0
        self._asked = control.Asked()
        self._ready = -1

        # the balance decides how many rollout workers there are
        self._balance = Balance(
            run.runtime.rollout.workers,
            run.runtime.rollout.max_workers,
            [reward_role(reward.title) for reward in run.rewards_for("evaluate")],
        )
        self._failure: Failure | None = None
        self._advised = False
        self._drained = fleet.nodes.drained
        self.error: BaseException | None = None
        """What went wrong here, and not at an actor."""

    def run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self._guarded(self._tick, "the pools stay as they are for now")
            if self._over.is_set():
                return
            self._guarded(
                lambda: self._show(timeout_seconds=PERIOD_SECONDS), "progress is not shown for now"
            )
            self._over.wait(max(0.0, PERIOD_SECONDS / 2 - (time.monotonic() - began)))

    def stop(self) -> Failure | None:
        """Shows what is left and ends. Returns why the run failed, if it did."""
        self._over.set()
        self.join(timeout=60)
        self._guarded(lambda: self._show(timeout_seconds=0.0), "the last records are not shown")
        self._guarded(self._hear_of_failure, "whether the run failed is not known")
        self._guarded(self._count_hours, "the last node hours are not counted")
        return self._failure

    def leave(self) -> None:
        """Ends without asking anything more, for a driver that is told to go; an answer that is on
        its way is waited for."""
        self._over.set()
        self.join(timeout=60)

    def _guarded(self, step: Callable[[], None], otherwise: str) -> None:
        try:
            step()
        except ray.exceptions.RayTaskError as error:  # ours: the coordinator's own code failed
            self._stumbled(error)
        except ray.exceptions.RayError as error:
            with contextlib.suppress(OSError):  # the screen may be gone
                print(f"{otherwise}: {error}", file=sys.stderr)
        except BaseException as error:  # noqa: BLE001 -- raised where the driver waits for the run
            self._stumbled(error)

    def _stumbled(self, error: BaseException) -> None:
        """The first error counts; nothing is shown any more, the rest goes on until the run has
        stopped."""
        if self.error is None:
            self.error = error
            if self._over.is_set():
                return
            with contextlib.suppress(UserError):  # a full disk ends the run by itself
                control.ask(self._folder, stop=True)

    def _tell(self, record: dict[str, Any]) -> None:
        if self.error is None:
            self._on_record(record)

    def _tick(self) -> None:
        storage.check(self._folder, tell=lambda note: self._tell({"note": note}))
        asked = control.asked(self._folder)
        if asked != self._asked:
            self._asked = asked
            if self._fleet.scale(asked):
                self._tell({"note": f"scaling to {_counts(self._fleet.wanted)}"})
            if asked.stop:
                self._tell(
                    {
                        "note": (
                            "asked to stop: the run ends with a checkpoint after the rounds in"
                            " flight"
                        )
                    }
                )
                self._status.write(state="stopping")

        # the fleet is brought to what is wanted
        standing = self._fleet.reconcile()
        nodes = self._fleet.nodes
        if nodes.drained > self._drained:
            self._tell({"note": f"{nodes.drained - self._drained} {_DRAINS}"})
            self._drained = nodes.drained
        if standing is not None:
            self._say(standing)
            self._hear_of_failure()

    def _hear_of_failure(self) -> None:
        """A coordinator that dies after a failure has forgotten it; here it is remembered."""
        failure: Any = ray.get(self._fleet.coordinator.failure.remote(), timeout=60)
        self._failure = failure or self._failure

    def _count_hours(self) -> None:
        self._fleet.nodes.survey()
        self._status.write(nodes=self._fleet.nodes.report())

    def _say(self, standing: Standing) -> None:
        pools = {
            role.label: {"reward": role.reward, "wanted": self._fleet.size(role), **asdict(state)}
            for role, state in standing.pools.items()
        }
        self._status.write(pools=pools, queue=standing.queue, nodes=self._fleet.nodes.report())
        self._balance.pools(ready=standing.pools[ROLLOUT].ready)

        # until the learner says something there is nothing else to show
        ready = sum(state.ready for state in standing.pools.values())
        if self._seen == 0 and ready != self._ready:
            self._ready = ready
            wanted = sum(self._fleet.size(role) for role in standing.pools)
            facts = {"round": None, "what": "workers are ready", "done": ready, "of": wanted}
            self._tell({"progress": facts})

    def _show(self, timeout_seconds: float) -> None:
        try:
            asked = self._fleet.coordinator.records.remote(self._seen, timeout_seconds)
            found: Any = ray.get(asked, timeout=60 + timeout_seconds)
        except ray.exceptions.RayActorError:
            return  # it comes back

        # a new coordinator numbers its lines anew
        epoch, lines = found
        if epoch != self._epoch:
            if self._epoch:
                self._seen = 0
                self._epoch = epoch
                return
            self._epoch = epoch

        # each line is stored, shown and may change the number of workers
        for line in lines:
            self._seen += 1
            self._status.record(line)
            self._tell(line)
            if wanted := self._balance.wanted(line, self._fleet.wanted[ROLLOUT]):
                self._fleet.scale(control.Asked(rollout_workers=wanted))
                self._tell(
                    {"note": f"scaling to {_counts(self._fleet.wanted)}: {self._balance.reason}"}
                )
            if self._balance.advice and not self._advised:
                self._advised = True
                self._tell({"note": self._balance.advice})


def _counts(wanted: dict[Role, int]) -> str:
    return ", ".join(
        f"{count} {role} worker{'s' if count > 1 else ''}" for role, count in wanted.items()
    )
