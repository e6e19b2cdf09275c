"""What watches over a run does not end before it, and what it knows of a failure is not lost; on
fakes of fleet and learner."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment import control
from rlalign.core.registry import UserError
from rlalign.runtime.pool import PoolState
from rlalign.runtime.roles import ROLLOUT, Role
from rlalign.runtime.training.coordinator import Standing
from rlalign.runtime.training.nodes import Nodes
from tests.runs import small_run

pytestmark = pytest.mark.ray


def coordinator(forgets: bool = False, records: int = 1) -> Any:
    """An actor that has so many records and keeps, or forgets, why the run failed."""
    import ray

    class Coordinator:
        kept: Any = None

        def records(self, since: int, timeout_seconds: float) -> tuple[str, list[dict[str, Any]]]:
            return "life", ([{"note": "one"}] * records)[since:]

        def begin(self, incarnation: str) -> Any:
            return self.kept

        def abort(self, failure: Any) -> None:
            self.kept = None if forgets else self.kept or failure

        def failure(self) -> Any:
            return self.kept

    return ray.remote(num_cpus=0)(Coordinator).remote()


class FakeFleet:
    """Counts how often it was asked to keep the pools as wanted."""

    def __init__(
        self, actor: Any, error: BaseException | None = None, ready: Sequence[int] = ()
    ) -> None:
        self.coordinator = actor
        self.error = error
        self.ready = ready
        self.looks = 0
        self.wanted = {ROLLOUT: 2}
        self.encoder = None
        self.places_are_cores = False
        self.nodes = Nodes()

    def scale(self, asked: control.Asked) -> bool:
        return False

    def size(self, role: Role) -> int:
        return self.wanted[role]

    def reconcile(self) -> Standing | None:
        """Says one count of ``ready`` after the other, and the last from then on."""
        self.looks += 1
        if self.error:
            raise self.error
        if not self.ready:
            return None
        ready = self.ready[min(self.looks, len(self.ready)) - 1]
        state = PoolState(ready=ready, starting=2 - ready, lost=0, busy=0, restarts=0)
        return Standing(
            epoch="one", pools={ROLLOUT: state}, numbers={}, queue=0, samples=0, handled_bytes=0
        )

    def end(self) -> None:
        """Nothing to end."""


def supervised(tmp_path: Path, fleet: FakeFleet, on_record: Any) -> Any:
    """A supervisor that has looked three times."""
    from rlalign.runtime.training.supervisor import Supervisor

    status = control.Status(tmp_path, 4, name="x")
    found = Supervisor(small_run(), tmp_path, fleet, status, on_record)  # type: ignore[arg-type]
    found.start()
    while fleet.looks < 3:  # however busy the machine is; the test's own time limit ends a hang
        assert found.is_alive()
        time.sleep(0.05)
    found.stop()
    return found


def test_a_screen_that_is_gone_stops_the_run_and_is_raised(
    ray_cluster: None, tmp_path: Path
) -> None:
    shown = []

    def broken(line: dict[str, Any]) -> None:
        shown.append(line)
        raise BrokenPipeError("the reader has gone")

    fleet = FakeFleet(coordinator())
    found = supervised(tmp_path, fleet, broken)
    assert isinstance(found.error, BrokenPipeError)
    assert len(shown) == 1, "nothing is shown after that"
    assert control.asked(tmp_path).stop, "the run was not asked to stop"


def test_a_fault_of_its_own_stops_the_run_and_is_raised(ray_cluster: None, tmp_path: Path) -> None:
    found = supervised(
        tmp_path, FakeFleet(coordinator(), ValueError("no such resource")), lambda _: None
    )
    assert str(found.error) == "no such resource"
    assert control.asked(tmp_path).stop


def test_a_run_that_starts_says_how_many_workers_are_ready(
    ray_cluster: None, tmp_path: Path
) -> None:
    shown: list[dict[str, Any]] = []
    supervised(tmp_path, FakeFleet(coordinator(records=0), ready=(0, 0, 2)), shown.append)
    counts = [line["progress"] for line in shown]
    same = {"round": None, "what": "workers are ready", "of": 2}
    assert counts == [{**same, "done": 0}, {**same, "done": 2}]


def test_an_actor_that_is_away_is_no_fault(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    actor = coordinator()
    ray.kill(actor)
    found = supervised(tmp_path, FakeFleet(actor), lambda _: None)
    assert found.error is None
    assert not control.asked(tmp_path).stop


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver's supervision with a fake fleet, and a learner that runs in this process."""
    from rlalign.runtime.training import fleet, train

    def run(tmp_path: Path, actor: Any, learner: Any, on_record: Any = lambda _: None) -> None:
        monkeypatch.setattr(fleet, "Fleet", lambda *_, **__: FakeFleet(actor))
        monkeypatch.setattr(
            train,
            "fit",
            lambda run, folder, coordinator, *_, **__: learner(run, folder, coordinator),
        )
        train._supervise(small_run(), tmp_path, on_record, dashboard="", places_are_cores=True)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True])
def test_a_failure_outlives_the_coordinator_that_was_told(
    ray_cluster: None, tmp_path: Path, faked: Any, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    """A coordinator that dies right after it was told has forgotten; the learner's own answer has
    not."""
    from rlalign.alignment import assemble
    from rlalign.runtime.training import train

    def refuse(run: Any, reader: Any) -> None:
        raise UserError("policy.path must be a folder, got 'nowhere'")

    monkeypatch.setattr(assemble, "build_learner", refuse)

    def learner(run: Any, folder: Path, actor: Any) -> Any:
        return train.learn({"run": run, "place": str(folder), "owner": "", "coordinator": actor})

    with pytest.raises(UserError, match="policy.path must be a folder"):
        faked(tmp_path, coordinator(forgets), learner)
    assert control.status_of(tmp_path)["state"] == "failed"


def test_a_driver_that_is_told_to_go_leaves_nobody_who_asks_ray(
    ray_cluster: None, tmp_path: Path, faked: Any
) -> None:
    """Ray is left next: a call after that would start another one."""

    def learner(run: Any, folder: Path, actor: Any) -> None:
        while not watching():
            time.sleep(0.05)
        raise KeyboardInterrupt

    def watching() -> bool:
        return any(thread.name == "supervisor" for thread in threading.enumerate())

    with pytest.raises(KeyboardInterrupt):
        faked(tmp_path, coordinator(), learner)
    assert not watching()
    assert control.status_of(tmp_path)["state"] == "stopped"


def test_what_a_screen_raised_reaches_the_caller(
    ray_cluster: None, tmp_path: Path, faked: Any
) -> None:
    def broken(line: dict[str, Any]) -> None:
        raise BrokenPipeError("the reader has gone")

    def learner(run: Any, folder: Path, actor: Any) -> None:
        while not control.asked(folder).stop:
            time.sleep(0.05)

    with pytest.raises(BrokenPipeError):
        faked(tmp_path, coordinator(), learner, broken)
    assert control.status_of(tmp_path)["state"] == "failed"
